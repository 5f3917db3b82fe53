"""Saving beside training: the loop copies the state, a thread puts it onto the disk.

At most one write is in flight. A disk that is full or read-only stops nothing: the older
checkpoints stay, the failure is told, and the next save tries again. Only the last save of a
process, at a signal or at the end, has to succeed.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from bigbatch.configs.errors import UserError
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.monitoring.log import Log
from bigbatch.trainers.recovery.checkpoint import Capture, TrainState, capture, gather, write
from bigbatch.trainers.recovery.stored import Retention

_NICE = 10  # the writer's share of a core comes after training's


class Saver:
    """Writes the checkpoints of one attempt of a run into `folder`.

    As a context manager it waits at its end for the write in flight, so that the log, which a
    checkpoint must not outlive, can be closed after it.
    """

    def __init__(self, folder: Path, engine: Engine, log: Log, retention: Retention) -> None:
        self._folder = folder
        self._engine = engine
        self._log = log
        self._retention = retention
        self._captured: Capture | None = None
        self._write: _Write | None = None
        self._told: set[str] = set()

    def save(
        self,
        state: TrainState,
        *,
        check: Callable[[], None] | None = None,
        score: float | None = None,
        last: bool = False,
    ) -> None:
        """Copy the state and start writing it. Collective, in the same step on every rank.

        `check` is called once it is copied: where it raises, nothing is written, and what it then
        finds right was right when it was copied. `score` is this step's on the validation split, by
        `retention.judge`, where it was evaluated. With `last` the checkpoint is on the disk at the
        return; raises UserError where it cannot be.
        """
        started = time.perf_counter()
        self._finish()
        captured = self._capture(state)
        if check is not None:
            check()
        if captured is not None:
            captured.content[self._retention.judge.key] = score
            self._write = _Write(self._folder, captured, self._retention, self._log)
            self._write.start()
            self._write.stall_s = time.perf_counter() - started
        if last:
            self._engine.on_main(self._finish_or_raise)

    def report(self) -> None:
        """Tell of a write that has ended since; costs nothing while it runs. Not collective."""
        if self._write is not None and not self._write.is_alive():
            self._finish()

    def _finish_or_raise(self) -> None:
        error = self._finish()
        if error:
            raise UserError(f"{error}; free some space or fix the permissions, then resume")

    def _capture(self, state: TrainState) -> Capture | None:
        """Rank 0's copy of the state; None elsewhere. Every rank calls it in the same step."""
        if self._engine.rank == 0:
            self._captured = capture(state, self._captured)
        elif state.pieces is not None:
            gather(state)  # this rank's pieces, for rank 0
        return self._captured

    def _finish(self) -> str | None:
        """Wait for the write in flight and tell how it went; returns what went wrong.

        What is no matter of the disk is a defect, and ends the run.
        """
        if self._write is None:
            return None
        done, self._write = self._write, None
        done.join()
        times = {"saved": done.captured.step, "stall_s": round(done.stall_s, 4)}
        for problem in done.problems:
            if problem not in self._told:  # each save tries again
                self._told.add(problem)
                self._log.error("not_removed", problem, saved=done.captured.step)
        if done.error is None:
            self._log.event("checkpoint", **times, write_s=round(done.write_s, 4))
            return None
        if not isinstance(done.error, OSError):
            raise done.error
        error = f"cannot save step {done.captured.step} in {self._folder}: {done.error}"
        self._log.error("save_failed", error, **times)
        return error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._finish()


class _Write(threading.Thread):
    """One checkpoint on its way to the disk. `stall_s` is what the loop waited for it."""

    def __init__(self, folder: Path, captured: Capture, retention: Retention, log: Log) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.captured = captured
        self.error: BaseException | None = None
        self.stall_s = self.write_s = 0.0
        self.problems: list[str] = []  # old checkpoints that could not be removed
        self._arguments = folder, captured, retention, log.sync, self.problems.append

    def run(self) -> None:
        started = time.perf_counter()
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            write(*self._arguments)
        except BaseException as error:
            self.error = error  # raised, or told, in the loop
        self.write_s = time.perf_counter() - started
