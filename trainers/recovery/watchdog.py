"""A thread in each rank that notices a step which hangs, says whose fault it is, and ends it.

A hung collective waits on every rank alike. Each rank therefore writes how far it is to its
heartbeat; the ranks that are behind the others, or whose heartbeat stands still, are missing.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from bigbatch.configs.rundir import RunDir, event_record
from bigbatch.trainers.monitoring.jsonl import JsonLines
from bigbatch.trainers.recovery.heartbeat import Heartbeat, read_heartbeat
from bigbatch.trainers.recovery.signals import SAVED, STALLED

# What a rank does, in the order of a step. Before "loading" come what may take long.
DOING = ("starting", "evaluating", "saving", "loading", "computing", "reducing")
_IN_STEP = ("loading", "computing", "reducing")
_PATIENCE = 10  # how much longer everything but a step may take, and the first one
_LONGEST = 20  # a hang is also this many times longer than the longest wait so far
_DUMP_S = 1.0  # what a rank gets to write its stacks after it was asked for them


def record_collectives() -> None:
    """Switch torch's flight recorder on; before torch.distributed starts."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


class Watchdog:
    """Ends this process where `beat` was not called for too long.

    In a step that is `stall_s` seconds, or 20 times the longest pause so far if that is more;
    elsewhere, and in the first step, ten times that.
    """

    def __init__(
        self, run: RunDir, heartbeat: Heartbeat, world: int, attempt: str, stall_s: float
    ) -> None:
        self._run = run
        self._heartbeat = heartbeat
        self._rank: int = heartbeat.record["rank"]
        self._world = world
        self._attempt = attempt  # the same text on all ranks, and another one at each start
        self._stall_s = stall_s
        self._tick_s = min(5.0, stall_s / 4)
        self._place: tuple[int, str] = (0, "starting")
        self._first = True  # until one whole step is done
        self._moved = time.monotonic()
        self._longest = 0.0
        self._stop = threading.Event()
        run.stacks.mkdir(mode=0o700, exist_ok=True)
        self._stacks = (run.stacks / f"rank-{self._rank:05d}.txt").open("a")
        # Works also where the interpreter cannot: it is C, and runs at once.
        faulthandler.register(signal.SIGUSR1, self._stacks, all_threads=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, doing: str) -> None:
        """Say that this rank goes on: `step` finished steps, and what comes now, of DOING."""
        now = time.monotonic()
        if self._strict():
            self._longest = max(self._longest, now - self._moved)
        first_ends = self._place[1] == "reducing" and doing != "reducing"
        # The time before the rest: the thread may look in between, and what becomes strict now
        # must not be judged by how long something patient took.
        self._moved = now
        self._place = (step, doing)
        if first_ends:
            self._first = False

    def limit(self) -> float:
        """Seconds without a beat after which this rank counts as hung."""
        patience = 1 if self._strict() else _PATIENCE
        return patience * max(self._stall_s, _LONGEST * self._longest)

    def _strict(self) -> bool:
        return not self._first and self._place[1] in _IN_STEP

    def _watch(self) -> None:
        while not self._stop.wait(self._tick_s):
            step, doing = self._place
            self._heartbeat.write(attempt=self._attempt, step=step, doing=doing)
            # For a hang that holds the interpreter, and so this thread: it ends by itself.
            limit = _PATIENCE * self.limit()
            faulthandler.dump_traceback_later(limit, exit=True, file=self._stacks)
            if time.monotonic() - self._moved > self.limit():
                self._end()

    def _end(self) -> None:
        """Dump the stacks, name the missing ranks, and leave."""
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._dump_collectives()
        others = [r for r in range(self._world) if r != self._rank]
        before = {r: read_heartbeat(self._run.heartbeats, r) for r in others}
        time.sleep(2 * self._tick_s)
        after = {r: read_heartbeat(self._run.heartbeats, r) for r in others}
        after[self._rank] = {**self._heartbeat.record, "beat": -1}
        missing = find_missing(before, after, self._attempt)
        here = [r for r in missing if after[r].get("host") == socket.gethostname()]
        self._signal([after[r] for r in here], signal.SIGUSR1)
        time.sleep(_DUMP_S)
        told = next((r for r in range(self._world) if r not in missing), self._rank)
        if told == self._rank:
            self._tell({r: after[r] for r in missing})
        else:
            time.sleep(_DUMP_S)  # who leaves first takes the others along
        self._signal([after[r] for r in here if r != self._rank], signal.SIGKILL)
        # Without an agent, the queue is what starts the run again.
        os._exit(STALLED if "TORCHELASTIC_RUN_ID" in os.environ else SAVED)

    def _tell(self, missing: dict[int, dict[str, Any]]) -> None:
        step, doing = self._place
        who = ", ".join(
            f"rank {r} ({h.get('host', 'never seen')}, {h.get('doing', 'not started')})"
            for r, h in missing.items()
        )
        text = (
            f"step {step + 1} hangs for {time.monotonic() - self._moved:.0f} s while {doing}; "
            f"missing: {who or 'no rank, all wait for each other'}; stacks in {self._run.stacks}"
        )
        print(f"bigbatch: {text}", file=sys.stderr, flush=True)
        events = JsonLines(self._run.events)
        record = event_record("stall", step, doing=doing, missing=sorted(missing), error=text)
        events.append(record)
        events.close()

    def _dump_collectives(self) -> None:
        """What torch's flight recorder knows: the last collectives, and which did not end."""
        torch: Any = sys.modules.get("torch")
        with suppress(Exception):  # not a public interface; the stacks are on disk already
            c10d = torch._C._distributed_c10d
            on_gpu = torch.cuda.is_available()
            dump = c10d._dump_nccl_trace_json if on_gpu else c10d._dump_fr_trace_json
            (self._run.stacks / f"collectives-{self._rank:05d}.json").write_bytes(dump())

    def _signal(self, records: list[dict[str, Any]], number: signal.Signals) -> None:
        for record in records:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(record["pid"], number)

    def __enter__(self) -> Self:
        self._heartbeat.write(attempt=self._attempt, step=0, doing="starting")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
        path = Path(self._stacks.name)
        if path.stat().st_size == 0:
            path.unlink()


def find_missing(
    before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], attempt: str
) -> list[int]:
    """Ranks that never started this attempt, whose heartbeat stood still, or that are behind.

    `before` and `after` are two readings of the heartbeats, apart by more than a beat; a rank
    that is only in `after` is the one that reads.
    """

    def place(record: dict[str, Any]) -> tuple[int, int]:
        return int(record["step"]), DOING.index(record["doing"])

    here = {r: h for r, h in after.items() if h.get("attempt") == attempt}
    alive = {r: h for r, h in here.items() if before.get(r, {}).get("beat") != h["beat"]}
    furthest = max(map(place, alive.values()), default=(0, 0))
    return sorted(r for r in after if r not in alive or place(alive[r]) < furthest)
