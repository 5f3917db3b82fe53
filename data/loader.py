"""From positions to micro-batches of decoded images.

Worker processes read and decode; nothing else. What a micro-batch holds follows from its
step and number alone, so any worker of any rank makes the same one.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bigbatch.configs.errors import UserError
from bigbatch.data.decode import Pixels, decode
from bigbatch.data.index import Index
from bigbatch.data.order import Order
from bigbatch.data.read import BadSample, ShardReader

_SUBSTITUTES = 20
_PREFETCH = 3  # micro-batches that each worker keeps ready


@dataclass(frozen=True)
class MicroBatch:
    """Decoded samples of one micro-batch, on the host.

    Each image lies in the top left corner of its canvas, [sizes[i, 0], sizes[i, 1]] pixels
    high and wide; the canvas is 0 beyond it.
    """

    step: int
    index: int  # of the micro-batch in its step
    samples: np.ndarray  # int64 [B]
    labels: Tensor  # int64 [B]
    images: Tensor  # uint8 [B, H, W, C]
    sizes: Tensor  # int32 [B, 2]: height, width
    bad: tuple[dict[str, Any], ...] = ()  # journal entries: what was substituted, and why

    def pin_memory(self) -> "MicroBatch":
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def train_batches(
    index: Index,
    order: Order,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    start_step: int,
    stop_step: int,
    image_size: int,
    channels: int,
    workers: int,
    threads: int,
    bad_samples: int,
    journal: Path | None,
    pin_memory: bool = False,
) -> Iterator[MicroBatch]:
    """Micro-batches rank, rank + world, ... of steps start_step to stop_step, in order.

    Unreadable samples are substituted by others of their class at the same position and
    noted in `journal`; more than `bad_samples` of them raise UserError.
    """
    source = _Training(
        _Decoder(index, image_size, channels, threads), order, global_batch, micro_batch
    )
    tasks = _Tasks(range(start_step, stop_step), range(rank, global_batch // micro_batch, world))
    found = 0
    for batch in _load(source, tasks, workers, pin_memory):
        if batch.bad:
            found += len(batch.bad)
            _note(batch, journal)
            if found > bad_samples:
                raise UserError(
                    f"{found} samples could not be read, the last one "
                    f"{batch.bad[-1]['shard']} at byte {batch.bad[-1]['offset']}: "
                    f"{batch.bad[-1]['reason']}; data.bad_samples allows {bad_samples}. "
                    f"Repair the shards under {index.root}, or raise the limit"
                )
        yield batch


def eval_batches(
    index: Index,
    *,
    batch: int,
    rank: int,
    world: int,
    image_size: int,
    channels: int,
    workers: int,
    threads: int,
    pin_memory: bool = False,
) -> Iterator[MicroBatch]:
    """Batches rank, rank + world, ... of all samples in index order; the last may be short.

    An unreadable sample raises UserError: an evaluation over other images is another one.
    """
    source = _Evaluation(_Decoder(index, image_size, channels, threads), batch)
    tasks = _Tasks(range(1), range(rank, -(-len(index) // batch), world))
    for loaded in _load(source, tasks, workers, pin_memory):
        if loaded.bad:
            first = loaded.bad[0]
            raise UserError(
                f"{first['shard']} at byte {first['offset']}: {first['reason']}; evaluation "
                "substitutes nothing, so repair the shard or write it again"
            )
        yield loaded


Task = tuple[int, int]  # step, micro-batch


class _Tasks(Sampler[Task]):
    """Steps times micro-batches, without ever listing them."""

    def __init__(self, steps: range, numbers: range) -> None:
        self.steps, self.numbers = steps, numbers

    def __len__(self) -> int:
        return len(self.steps) * len(self.numbers)

    def __iter__(self) -> Iterator[Task]:
        return ((step, number) for step in self.steps for number in self.numbers)


class _Decoder:
    """Reads and decodes samples with a few threads: simplejpeg lets the others run."""

    def __init__(self, index: Index, image_size: int, channels: int, threads: int) -> None:
        self.index, self.image_size, self.channels = index, image_size, channels
        self.threads = threads
        self.reader = ShardReader(index)
        self._pool: ThreadPoolExecutor | None = None

    def one(self, sample: int) -> Pixels | str:
        """Pixels, or the reason why there are none."""
        try:
            return decode(
                self.reader.read(sample), image_size=self.image_size, channels=self.channels
            )
        except BadSample as error:
            return str(error)

    def all(self, samples: Sequence[int]) -> list[Pixels | str]:
        if self.threads == 1:
            return [self.one(s) for s in samples]
        if self._pool is None:  # in the worker, not before the fork
            self._pool = ThreadPoolExecutor(self.threads)
        return list(self._pool.map(self.one, samples))

    def entry(self, sample: int, reason: str) -> dict[str, Any]:
        """What the journal says of a bad sample."""
        return {
            "sample": sample,
            "shard": self.index.shards[int(self.index.shard[sample])].name,
            "offset": int(self.index.offset[sample]),
            "reason": reason,
        }

    def batch(
        self, task: Task, samples: np.ndarray, pixels: list[Pixels], bad: list[dict[str, Any]]
    ) -> MicroBatch:
        labels = torch.from_numpy(self.index.label[samples].astype(np.int64))
        images, sizes = _canvas(pixels, self.channels)
        return MicroBatch(*task, samples, labels, images, sizes, tuple(bad))


class _Source(Dataset["MicroBatch | str"]):
    """Micro-batches by task; the message where a UserError stops one.

    An exception would cross from the worker with its traceback in the text.
    """

    def __getitem__(self, task: Task) -> MicroBatch | str:
        try:
            return self.make(task)
        except UserError as error:
            return str(error)

    def make(self, task: Task) -> MicroBatch:
        raise NotImplementedError


@dataclass
class _Training(_Source):
    decoder: _Decoder
    order: Order
    global_batch: int
    micro_batch: int

    def make(self, task: Task) -> MicroBatch:
        step, number = task
        start = step * self.global_batch + number * self.micro_batch
        positions = np.arange(start, start + self.micro_batch, dtype=np.int64)
        samples = self.order.samples(positions)
        decoded = self.decoder.all(samples.tolist())
        bad: list[dict[str, Any]] = []
        for i, pixels in enumerate(decoded):
            if isinstance(pixels, str):
                entries = self._substitute(samples, decoded, i, int(positions[i]), pixels)
                bad += [{"step": step, "position": int(positions[i]), **e} for e in entries]
        good = [p for p in decoded if not isinstance(p, str)]
        return self.decoder.batch(task, samples, good, bad)

    def _substitute(
        self, samples: np.ndarray, decoded: list[Pixels | str], i: int, position: int, reason: str
    ) -> list[dict[str, Any]]:
        """Replace sample i in place; the journal entries of all that turned out bad."""
        original = int(samples[i])
        entries = [self.decoder.entry(original, reason)]
        for attempt in range(_SUBSTITUTES):
            other = self.order.substitute(original, position, attempt)
            pixels = self.decoder.one(other)
            if not isinstance(pixels, str):
                samples[i], decoded[i] = other, pixels
                return entries
            entries.append(self.decoder.entry(other, pixels))
        raise UserError(
            f"{_SUBSTITUTES} samples of one class in a row cannot be read, the last one "
            f"{entries[-1]['shard']} at byte {entries[-1]['offset']}: {entries[-1]['reason']}"
        )


@dataclass
class _Evaluation(_Source):
    decoder: _Decoder
    size: int

    def make(self, task: Task) -> MicroBatch:
        start = task[1] * self.size
        samples = np.arange(start, min(start + self.size, len(self.decoder.index)))
        decoded = self.decoder.all(samples.tolist())
        pairs = zip(samples.tolist(), decoded, strict=True)
        bad = [self.decoder.entry(s, p) for s, p in pairs if isinstance(p, str)]
        good = [p for p in decoded if not isinstance(p, str)]
        return self.decoder.batch(task, samples, good, bad)


def _canvas(pixels: list[Pixels], channels: int) -> tuple[Tensor, Tensor]:
    """One uint8 tensor that holds every image in its top left corner, and their sizes."""
    sizes = np.array([p.shape[:2] for p in pixels], np.int32).reshape(-1, 2)
    height, width = sizes.max(axis=0).tolist() if len(pixels) else (1, 1)
    shape = (len(pixels), height, width, channels)
    if torch.utils.data.get_worker_info() is None:
        images = torch.zeros(shape, dtype=torch.uint8)
    else:
        # Allocated where the trainer will map it: nothing is copied on the way there. The
        # system hands out shared memory filled with zeros.
        storage = torch.UntypedStorage._new_shared(prod(shape))
        images = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    for canvas, image in zip(images.numpy(), pixels, strict=True):
        canvas[: image.shape[0], : image.shape[1]] = image
    return images, torch.from_numpy(sizes)


def _load(source: _Source, tasks: _Tasks, workers: int, pin_memory: bool) -> Iterator[MicroBatch]:
    """torch's DataLoader over tasks: it keeps their order, whoever is done first.

    Workers are forked: they start in milliseconds, where spawned ones would import torch
    again, for seconds. They touch neither CUDA nor OpenMP, whose threads do not survive a
    fork.
    """
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=tasks,
        num_workers=min(workers, len(tasks)),
        collate_fn=_as_is,
        pin_memory=pin_memory,
        prefetch_factor=_PREFETCH if workers and len(tasks) else None,
        multiprocessing_context="fork" if workers and len(tasks) else None,
    )
    try:
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a decoding worker died ({error}); where memory ran out, lower data.workers or "
            "micro_batch, then resume the run"
        ) from error


def _as_is(batch: Any) -> Any:
    return batch


def _note(batch: MicroBatch, journal: Path | None) -> None:
    if journal is not None:
        with journal.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in batch.bad)
