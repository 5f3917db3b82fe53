"""Writing planned shards, here or in several processes."""

import errno
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
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
from bigbatch.configs.terminal import Terminal
from bigbatch.data.classes import UNLABELLED
from bigbatch.data.pool import CONTEXT, process_pool, uninterrupted
from bigbatch.data.tar import write_end, write_member
from bigbatch.data.targets import target_json
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


class _Archive:
    """One shard while it is written: through a temporary file, under its name when it is whole."""

    def __init__(self, work: Work, shard: Shard) -> None:
        self.shard = shard
        self.path = Path(work.folder) / shard.name
        self.path.parent.mkdir(exist_ok=True)
        self.temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        self.file = self.temporary.open("wb", buffering=1 << 20)
        self.left = len(shard.items)
        self.skipped: list[tuple[str, str]] = []

    def add(self, key: str, texts: dict[str, bytes], image: tuple[bytes, str] | str) -> None:
        """The next sample, or why it is left out."""
        self.left -= 1
        if isinstance(image, str):
            self.skipped.append((key, image))
            return
        data, extension = image
        write_member(self.file, f"{key}.{extension}", data)
        for name, text in texts.items():
            write_member(self.file, f"{key}.{name}", text)

    def finish(self) -> dict[str, Any]:
        """The record for the journal."""
        write_end(self.file)
        size = self.file.tell()
        self.file.close()
        self.temporary.rename(self.path)
        samples = len(self.shard.items) - len(self.skipped)
        name = self.shard.name
        return {"shard": name, "samples": samples, "bytes": size, "skipped": self.skipped}


def _write_shards(
    work: Work, shards: Sequence[Shard], tick: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """Write one archive or more; yield the record of each when it is whole.

    Window by window: what is read for one of them serves those of other splits, too. Without
    windows one archive comes behind the other.
    """
    numbers = np.repeat(np.arange(len(shards)), [len(shard.items) for shard in shards])
    order = np.lexsort((numbers, np.concatenate([shard.windows for shard in shards])))
    items = np.concatenate([shard.items for shard in shards])[order].tolist()
    opened: dict[int, _Archive] = {}
    try:
        with ThreadPoolExecutor(_THREADS) as threads:
            images = _prepared(work, _read(work, items, tick), threads)
            for i, number, image in zip(items, numbers[order].tolist(), images, strict=True):
                if number not in opened:
                    opened[number] = _Archive(work, shards[number])
                archive = opened[number]
                archive.add(work.source.keys[i], texts_of(work.source, i), image)
                if not archive.left:
                    yield opened.pop(number).finish()
    finally:
        for archive in opened.values():
            archive.file.close()


def texts_of(source: Source, i: int) -> dict[str, bytes]:
    """Label and target of a sample, by the extension of their members."""
    texts = {"cls": str(int(source.labels[i])).encode()}
    if source.targets is None:
        return texts
    target = {"target.json": target_json(source.targets[i])}
    return target if source.classes == UNLABELLED else texts | target


# Each process checks images in two threads, while it reads the next ones and writes those before:
# decoders run without the GIL. A thread is handed as much at once.
_THREADS = 2
_BATCH_BYTES, _BATCH = 1 << 20, 64


def _read(
    work: Work, items: Sequence[int], tick: Callable[[int], None]
) -> Iterator[list[bytes | str]]:
    """Encoded images, or why they are left out, in batches of about _BATCH_BYTES."""
    batch, size = list[bytes | str](), 0
    for i in items:
        try:
            batch.append(work.source.read(i))
        except OSError as error:
            batch.append(_why_left_out(error))
        size += len(batch[-1])
        if size >= _BATCH_BYTES or len(batch) == _BATCH:
            tick(len(batch))
            yield batch
            batch, size = [], 0
    tick(len(batch))
    yield batch


def _prepared(
    work: Work, batches: Iterable[list[bytes | str]], threads: ThreadPoolExecutor
) -> Iterator[tuple[bytes, str] | str]:
    """Each image as it goes into a shard and its extension, or why it is left out; in order."""
    waiting = deque[Future[list[tuple[bytes, str] | str]]]()
    for batch in batches:
        waiting.append(threads.submit(_prepare, work, batch))
        if len(waiting) > _THREADS:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _prepare(work: Work, batch: list[bytes | str]) -> list[tuple[bytes, str] | str]:
    prepared = list[tuple[bytes, str] | str]()
    for data in batch:
        try:
            prepared.append(
                data if isinstance(data, str) else prepare(data, work.short_side, work.quality)
            )
        except OSError as error:
            prepared.append(_why_left_out(error))
    return prepared


def _why_left_out(error: OSError) -> str:
    """Why this image is; raises an error that would be true of the next file as well."""
    if error.errno not in _SKIPPED_ERRORS:
        raise error
    return error.strerror or str(error)


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
    if not tasks:
        return
    total = sum(len(s.items) for task in tasks for s in task)
    workers = processes(work.source, workers)
    with _progress_bar(total, progress) as advance:
        if workers == 1 or len(tasks) <= 1:
            yield from _write_shards(work, [s for task in tasks for s in task], advance)
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
    return list(_write_shards(work, task, tick))


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} images/s")


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with images per second and the time left."""
    console = Terminal(stderr=True)
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
