"""From positions to micro-batches of decoded images.

What a micro-batch holds follows from its step and number alone, so any worker of any rank
makes the same one. The trainer's process computes which samples those are; decoding is the
work of other processes (data/workers.py), or of this one where there are none.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from bigbatch.configs.errors import Changed, UserError
from bigbatch.data.batch import BatchPlan, Decoding, MicroBatch
from bigbatch.data.begun import AHEAD, Begun, byte_ranges
from bigbatch.data.decode import Pixels
from bigbatch.data.decode_batch import BatchDecoder, ByteRanges, Decoded, Key, Source
from bigbatch.data.geometry import Frames
from bigbatch.data.index import Index
from bigbatch.data.journal import append
from bigbatch.data.order import Order, Positions
from bigbatch.data.read import BadSample
from bigbatch.data.remote import prefetching, prefetching_in_order
from bigbatch.data.workers import WorkerPool

_POSITIONS = 4096  # that are turned into samples at once
_SUBSTITUTES = 20
# Encoded bytes of a data set that its decoders remember, and pixels that each of them does.
_FEW_BYTES, _REMEMBERED = 1 << 24, 1 << 26


def train_batches(
    index: Index, order: Order, plan: BatchPlan, decoding: Decoding
) -> Iterator[MicroBatch]:
    """The plan's micro-batches, in order.

    `decoding.workers` processes decode; large images come at the resolution that `view` needs,
    or else as `decode.whole_factor` says. Unreadable samples are substituted by others of their
    class at the same position and noted in `journal`; more than `bad_samples` of them raise
    UserError, as do a lost shard and a worker that dies.
    """
    source = _source(index, decoding)
    if int(index.size.sum()) <= _FEW_BYTES:
        source = replace(source, remember=_REMEMBERED)
    mender = _Mender(index, order, BatchDecoder(replace(source, threads=1)))
    size, tasks = plan.micro_batch, plan.places()

    def work() -> Iterator[_Work]:
        with prefetching(index, order, plan.numbers) as prefetch:
            # Several at once: a call for few positions takes as long as one for thousands.
            while some := list(islice(tasks, max(1, _POSITIONS // size))):
                starts = [start for _, _, start in some]
                positions = np.add.outer(np.array(starts, np.int64), np.arange(size))
                samples = order.samples(positions.ravel()).reshape(positions.shape)
                for (step, number, _), own, at in zip(some, samples, positions, strict=True):
                    prefetch(int(at[0]), own)
                    yield _Work(step, number, own, at)

    def batches() -> Iterator[MicroBatch]:
        found = 0
        for todo, decoded in _decode(index, source, work(), decoding.workers):
            if not decoded.bad:
                yield _batch(index, decoding.channels, todo, todo.samples, decoded)
                continue
            samples, mended, entries = mender.mend(todo, decoded)
            found += len(entries)
            append(decoding.journal, entries)
            if found > decoding.bad_samples:
                raise Changed(
                    f"{found} samples could not be read, the last one {_where(entries[-1])}; "
                    f"data.bad_samples allows {decoding.bad_samples}. Repair the shards under "
                    f"{index.place}, or raise the limit"
                )
            yield _batch(index, decoding.channels, todo, samples, mended, entries)

    return pinned(batches()) if decoding.pin_memory else batches()


def eval_batches(
    index: Index,
    decoding: Decoding,
    *,
    batch: int,
    rank: int,
    world: int,
    leave_out_bad: bool = False,
    begun: Begun | None = None,
) -> Iterator[MicroBatch]:
    """Batches rank, rank + world, ... of all samples in index order; the last may be short.

    An unreadable sample raises UserError: an evaluation over other images is another one. With
    `leave_out_bad` its batch comes without it, and says so in `bad`. Where what has `begun` fits,
    it goes on with that.
    """
    source = _source(index, decoding)

    def work() -> Iterator[_Work]:
        with prefetching_in_order(index) as prefetch:
            for number in range(rank, -(-len(index) // batch), world):
                samples = np.arange(number * batch, min((number + 1) * batch, len(index)))
                prefetch(int(samples[0]), samples)
                yield _Work(0, number, samples, samples)

    def batches() -> Iterator[MicroBatch]:
        for todo, decoded in _decode(index, source, work(), decoding.workers, begun):
            bad = [_entry(index, int(todo.samples[i]), r) for i, r in sorted(decoded.bad.items())]
            if bad and not leave_out_bad:
                raise UserError(
                    f"{_where(bad[0])}; evaluation substitutes nothing, so repair the shard or "
                    "write it again"
                )
            good = np.array([i not in decoded.bad for i in range(len(todo.samples))])
            if bad:
                decoded = _without_bad(decoded, good, decoding.channels)
            yield _batch(index, decoding.channels, todo, todo.samples[good], decoded, bad)

    return pinned(batches()) if decoding.pin_memory else batches()


def _without_bad(decoded: Decoded, good: npt.NDArray[np.bool_], channels: int) -> Decoded:
    pieces = _pieces(decoded, channels)
    kept = [piece for piece, keep in zip(pieces, good, strict=True) if keep]
    pixels = np.concatenate([decoded.pixels[:0], *kept])
    return Decoded(pixels, decoded.frames[good], {}, decoded.slow_read)


def _pieces(decoded: Decoded, channels: int) -> list[Pixels]:
    """The pixels of each image."""
    frames = decoded.frames
    ends = np.cumsum(frames["height"].astype(np.int64) * frames["width"]) * channels
    return np.split(decoded.pixels, ends[:-1])


@dataclass(frozen=True)
class _Work:
    """What a micro-batch is to hold."""

    step: int
    index: int
    samples: Positions
    positions: Positions

    @property
    def key(self) -> Key:
        return self.step, self.index


def _batch(
    index: Index,
    channels: int,
    work: _Work,
    samples: Positions,
    decoded: Decoded,
    bad: Iterable[dict[str, Any]] = (),
) -> MicroBatch:
    sizes = np.stack([decoded.frames["height"], decoded.frames["width"]], 1)
    return MicroBatch(
        step=work.step,
        index=work.index,
        samples=samples,
        labels=torch.from_numpy(index.label[samples].astype(np.int64)),
        pixels=torch.from_numpy(decoded.pixels),
        sizes=torch.from_numpy(sizes),
        channels=channels,
        bad=tuple(bad),
        slow_read=decoded.slow_read,
        stored=decoded.frames,
        targets=None if index.target is None else torch.from_numpy(index.target[samples]),
    )


def _source(index: Index, decoding: Decoding) -> Source:
    return Source(
        root=index.root,
        shards=[file.name for file in index.shards],
        image_size=decoding.image_size,
        channels=decoding.channels,
        threads=decoding.threads,
        remote=index.remote,
        view=decoding.view,
        loose=index.loose,
    )


class _Decoder(Protocol):
    def submit(self, byte_ranges: ByteRanges, key: Key) -> None: ...
    def receive(self) -> Decoded: ...
    def close(self) -> None: ...


class _InProcess:
    """Stands in for a WorkerPool where there are no workers."""

    def __init__(self, source: Source) -> None:
        self._decoder = BatchDecoder(source)
        self._waiting: deque[tuple[ByteRanges, Key]] = deque()

    def submit(self, byte_ranges: ByteRanges, key: Key) -> None:
        self._waiting.append((byte_ranges, key))

    def receive(self) -> Decoded:
        byte_ranges, key = self._waiting.popleft()
        return self._decoder.decode(byte_ranges, lambda n: np.empty(n, np.uint8), key)

    def close(self) -> None:
        self._decoder.close()


def _decode(
    index: Index,
    source: Source,
    works: Iterator[_Work],
    workers: int,
    begun: Begun | None = None,
) -> Iterator[tuple[_Work, Decoded]]:
    """Each work with its decoded samples, in order; the next ones are decoded meanwhile."""
    pool: _Decoder
    if begun is not None and begun.claim(source):
        pool = begun
    else:
        pool = WorkerPool(source, workers) if workers else _InProcess(source)
    coming: deque[_Work] = deque()
    try:
        for work in works:
            coming.append(work)
            pool.submit(byte_ranges(index, work.samples), work.key)
            if len(coming) > AHEAD * workers:
                yield coming.popleft(), pool.receive()
        while coming:
            yield coming.popleft(), pool.receive()
    finally:
        pool.close()


class _Mender:
    """Puts other samples of the same classes where samples could not be read."""

    def __init__(self, index: Index, order: Order, decoder: BatchDecoder) -> None:
        self.index, self.order, self.decoder = index, order, decoder

    def mend(
        self, work: _Work, decoded: Decoded
    ) -> tuple[Positions, Decoded, list[dict[str, Any]]]:
        """Samples and pixels without bad ones, and the journal entries of all that were."""
        channels = self.decoder.source.channels
        samples, frames = work.samples.copy(), decoded.frames.copy()
        pieces = _pieces(decoded, channels)
        entries: list[dict[str, Any]] = []
        for place, reason in sorted(decoded.bad.items()):
            other, image, frame, found = self._substitute(work, place, reason)
            samples[place], frames[place], pieces[place] = other, frame[0], image.ravel()
            place_of = {"step": work.step, "position": int(work.positions[place])}
            entries += [{**place_of, **entry, "substitute": other} for entry in found]
        return samples, Decoded(np.concatenate(pieces), frames, {}), entries

    def _substitute(
        self, work: _Work, place: int, reason: str
    ) -> tuple[int, Pixels, Frames, list[dict[str, Any]]]:
        sample, position = int(work.samples[place]), int(work.positions[place])
        entries = [_entry(self.index, sample, reason)]
        for attempt in range(_SUBSTITUTES):
            other = self.order.substitute(sample, position, attempt)
            byte_range = byte_ranges(self.index, np.array([other])).tolist()[0]
            try:
                image, frame = self.decoder.one(byte_range, place, len(work.samples), work.key)
            except BadSample as error:
                entries.append(_entry(self.index, other, str(error)))
            else:
                return other, image, frame, entries
        raise Changed(
            f"{_SUBSTITUTES} samples of one class in a row cannot be read, the last one "
            f"{_where(entries[-1])}; repair the shards under {self.index.place}"
        )


def _entry(index: Index, sample: int, reason: str) -> dict[str, Any]:
    """What the journal says of a bad sample."""
    return {
        "sample": sample,
        "shard": index.shards[int(index.shard[sample])].name,
        "offset": int(index.offset[sample]),
        "reason": reason,
    }


def _where(entry: dict[str, Any]) -> str:
    return f"{entry['shard']} at byte {entry['offset']:,}: {entry['reason']}"


def pinned(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Batches in page-locked memory, copied one ahead by a thread of their own."""
    # A new thread would lock memory through device 0, whichever device this rank has.
    device = torch.cuda.current_device()
    return _ahead(batches, MicroBatch.pin_memory, lambda: torch.cuda.set_device(device))


def _ahead(
    batches: Iterator[MicroBatch],
    prepare: Callable[[MicroBatch], MicroBatch],
    initialise: Callable[[], None],
) -> Iterator[MicroBatch]:
    """prepare(batch) of each batch; a thread makes the next one in the meantime."""

    def make() -> MicroBatch | None:
        batch = next(batches, None)
        return None if batch is None else prepare(batch)

    with ThreadPoolExecutor(1, initializer=initialise) as thread:
        try:
            coming = thread.submit(make)
            while (batch := coming.result()) is not None:
                coming = thread.submit(make)
                yield batch
        finally:
            thread.shutdown(wait=True)
            batches.close()  # type: ignore[attr-defined]  # a generator
