"""TensorBoard as a view of metrics.jsonl. Free of torch; the only module that imports tensorboard.

The event files are made anew from metrics.jsonl at each start, so that each step stands in
them exactly once, whatever the attempts before had written. A thread does it.
"""

import os
import queue
import shutil
import socket
import threading
import time
from itertools import chain
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.monitoring.wandb_view import flat_row


class TensorBoardView:
    """One attempt's event file in `tensorboard/`, fed through a queue."""

    def __init__(self, run: RunDir, start_step: int) -> None:
        try:
            import tensorboard  # noqa: F401
        except ModuleNotFoundError:
            raise UserError(
                "log.tensorboard needs the package tensorboard; `pip install "
                "'bigbatch[tensorboard]'`, or set log.tensorboard=false"
            ) from None
        self._run = run
        self._start_step = start_step
        self._rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="tensorboard", daemon=True)
        self._thread.start()

    def send(self, record: dict[str, Any]) -> None:
        """Hand over one record of metrics.jsonl; never blocks."""
        if self._thread.is_alive():
            self._rows.put(record)

    def close(self, patience: float = 60.0) -> None:
        self._rows.put(None)
        self._thread.join(patience)

    def problems(self) -> list[str]:
        """What went wrong since the last call."""
        return [self._problems.get() for _ in range(self._problems.qsize())]

    def _main(self) -> None:
        try:
            self._follow()
        except Exception as error:  # a full disk; the run goes on without it
            self._problems.put(f"{type(error).__name__}: {error}")

    def _follow(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = self._run.path / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # Its EventFileWriter has a thread of its own, which ends with a traceback on a full disk.
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.0"
        past = (r for r in iter_jsonl(self._run.metrics) if r["step"] <= self._start_step)
        with (folder / name).open("wb") as file:
            writer = RecordWriter(file)
            writer.write(Event(file_version="brain.Event:2").SerializeToString())
            for record in chain(past, iter(self._rows.get, None)):
                row = flat_row(record)
                step = int(row.pop("train/step"))
                numbers = {tag: value for tag, value in row.items() if not isinstance(value, str)}
                values = [Summary.Value(tag=tag, simple_value=v) for tag, v in numbers.items()]
                event = Event(step=step, summary=Summary(value=values))
                writer.write(event.SerializeToString())
                if self._rows.empty():
                    writer.flush()
