"""Writing planned shards, here or in several processes."""

import errno
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from bigbatch.configs.errors import UserError
from bigbatch.data.pool import CONTEXT, process_pool, uninterrupted
from bigbatch.data.tar import write_end, write_member
from bigbatch.data.writing.assign import Shard
from bigbatch.data.writing.recode import prepare
from bigbatch.data.writing.sources import Source


@dataclass(frozen=True, eq=False)
class Work:
    """What each process needs to write any of the shards."""

    source: Source
    folder: str
    short_side: int | None
    quality: int


def _write_shard(work: Work, shard: Shard, tick: Callable[[int], None]) -> dict[str, Any]:
    """Write one archive through a temporary file; return its record for the journal."""
    path = Path(work.folder) / shard.name
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    skipped: list[tuple[str, str]] = []
    with temporary.open("wb", buffering=1 << 20) as file:
        for i in shard.items.tolist():
            tick(1)
            key = work.source.keys[i]
            try:
                data, extension = prepare(work.source.read(i), work.short_side, work.quality)
            except OSError as error:
                if error.errno not in _SKIPPED_ERRORS:
                    raise
                skipped.append((key, error.strerror or str(error)))
                continue
            write_member(file, f"{key}.{extension}", data)
            write_member(file, f"{key}.cls", str(work.source.labels[i]).encode())
        write_end(file)
        size = file.tell()
    temporary.rename(path)
    samples = len(shard.items) - len(skipped)
    return {"shard": shard.name, "samples": samples, "bytes": size, "skipped": skipped}


# Bad bytes (no errno), and files that are gone or forbidden, are skipped. Anything else, such
# as EIO or ESTALE, would be true of the next file as well: the run stops and can be repeated.
_SKIPPED_ERRORS = (None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP)


# What all processes together may hold of a source; a process needs so much besides.
_HELD_TOGETHER = 8 << 30
_PROCESS = 150 << 20


def processes(source: Source, workers: int) -> int:
    """`workers`, or as many as together hold 8 GiB of row groups, libraries included."""
    if not source.held:
        return workers
    return min(workers, max(1, _HELD_TOGETHER // (source.held + _PROCESS)))


def write_all(
    work: Work,
    tasks: Sequence[list[Shard]],
    workers: int,
    progress: bool,
) -> Generator[dict[str, Any], None, None]:
    """Write shards, here or in `workers` processes; yield the records as they come."""
    total = sum(len(s.items) for task in tasks for s in task)
    workers = processes(work.source, workers)
    with _progress_bar(total, progress) as advance:
        if workers == 1 or len(tasks) <= 1:
            for task in tasks:
                for planned in task:
                    yield _write_shard(work, planned, advance)
            return
        counter, stop = CONTEXT.Value("q", 0), CONTEXT.Event()
        with process_pool(min(workers, len(tasks)), _start_worker, work, counter, stop) as pool:
            shown = 0
            try:
                with uninterrupted():
                    waiting = {pool.submit(_work_on, task) for task in tasks}
                while waiting:
                    finished, waiting = wait(waiting, 0.2, FIRST_COMPLETED)
                    advance(counter.value - shown)
                    shown = counter.value
                    for future in finished:
                        yield from future.result()
            except BrokenProcessPool:
                raise UserError(
                    "a worker process was killed, perhaps for want of memory; repeat the command "
                    "with fewer workers: it goes on where it was"
                ) from None
            finally:
                stop.set()  # an error or Ctrl-C should not wait for the end of large shards
                pool.shutdown(cancel_futures=True)


# Set once in each worker process: a source can be large, and should not travel with each task.
_worker: tuple[Work, Callable[[int], None]]


class _Stopped(Exception):
    """The parent gave up; nobody waits for this process's result."""


def _start_worker(work: Work, counter: "Synchronized[int]", stop: Event) -> None:
    global _worker

    def tick(samples: int) -> None:
        if stop.is_set():
            raise _Stopped
        with counter.get_lock():
            counter.value += samples

    _worker = work, tick


def _work_on(task: list[Shard]) -> list[dict[str, Any]]:
    work, tick = _worker
    return [_write_shard(work, planned, tick) for planned in task]


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} images/s")


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with images per second and the time left."""
    console = Console(stderr=True)
    columns = (
        TextColumn("sharding"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task("sharding", total=total)
        yield lambda samples: bar.update(task, advance=samples)
