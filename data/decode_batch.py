"""Reading and decoding a whole micro-batch into one stretch of memory. No torch.

Pixels are packed: one image after another, without padding. JPEGs are decoded right where
they will be read, so nothing is written twice, and a portrait among landscapes costs no
more memory than it has pixels.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigbatch.data.decode import (
    LONGEST,
    MAX_BYTES,
    Jpeg,
    Pixels,
    fill,
    open_pixels,
    reduced,
    size_after,
    whole_factor,
)
from bigbatch.data.geometry import FRAME, Frames, View, whole_frames
from bigbatch.data.read import BadSample, ShardReader
from bigbatch.data.staging import Cache, Remote

# Where the encoded bytes of a sample lie: columns of the index.
BYTE_RANGE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])
ByteRanges = npt.NDArray[np.void]  # [B], of dtype BYTE_RANGE
Key = tuple[int, int]  # step and micro-batch, from which crops are drawn
_QUICK = 2048  # encoded bytes of an image, mean of a batch, that one thread decodes sooner than two
# Bytes of pixels that wait for the frames of their batch: of an image, and of all together.
_SMALL, _WAITING = 1 << 18, 1 << 26


@dataclass(frozen=True)
class Decoded:
    """Images one after another, each in rows of pixels."""

    pixels: npt.NDArray[np.uint8]  # [sum of height * width * channels]
    frames: Frames  # [B]; height and width are 0 for a bad one
    bad: dict[int, str]  # place in the batch: why its bytes cannot be used
    slow_read: tuple[int, float] | None = None  # the shard that took longest, and its seconds


@dataclass(frozen=True)
class Source:
    """Where a decoder finds its shards, and what it makes of them."""

    root: Path
    shards: Sequence[str]
    image_size: int
    channels: int
    threads: int
    remote: Remote | None = None  # instead of root
    view: View | None = None  # what will be seen of the images; without it, maybe all
    loose: bool = False  # the shards are image files, of which no CRC is known
    remember: int = 0  # bytes of pixels at most, of small images that Pillow decodes

    def reader(self) -> ShardReader:
        if self.remote is None:
            return ShardReader([self.root / name for name in self.shards], loose=self.loose)
        cache = Cache(Path(self.remote.cache), self.remote.limit)
        return ShardReader([self.remote.shard(name) for name in self.shards], cache)


class BatchDecoder:
    """Reads and decodes with a few threads: simplejpeg and pread let the others run."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._reader = source.reader()
        self._pool = ThreadPoolExecutor(source.threads - 1) if source.threads > 1 else None
        # The first ones stay: in a random order no others would be asked for sooner.
        self._remembered = dict[tuple[int, ...], Pixels]()
        self._room = source.remember

    def decode(
        self, byte_ranges: ByteRanges, allocate: Callable[[int], Pixels], key: Key = (0, 0)
    ) -> Decoded:
        """Decode a batch into the uint8 array that `allocate` makes for so many bytes.

        `key` is the micro-batch's. Raises UserError for a shard that cannot be read.
        """
        places = byte_ranges.tolist()
        count, channels = len(places), self.source.channels
        opened: list[Jpeg | Pixels] = [_NOTHING] * count
        frames = np.zeros(count, FRAME)
        sizes = np.zeros(
            (count, 2), np.int64
        )  # of those that are opened, but for what is cut already
        bad: dict[int, str] = {}
        seconds = [0.0] * count
        small = min(_SMALL, _WAITING // count)

        def read(i: int) -> None:
            started = time.perf_counter()
            try:
                image: Jpeg | Pixels | None = self._remembered.get(places[i])
                if image is None:
                    data = self._read(places[i])
                    seconds[i] = time.perf_counter() - started
                    image = open_pixels(data, channels)
                    self._remember(places[i], image)
                if isinstance(image, Jpeg):
                    sizes[i] = image[:2]
                elif image.nbytes <= small:
                    sizes[i] = image.shape[:2]
                else:  # not kept at its full size
                    frames[i], image = self._stored(image, i, count, key)
                opened[i] = image
            except BadSample as error:
                bad[i] = str(error)

        # Threads that hand one another so little take longer than one alone.
        alone = int(byte_ranges["size"].sum()) <= _QUICK * count
        self._each(count, read, alone=alone)
        # Of all at once: a frame alone takes longer than a small image's decoding.
        whole = np.flatnonzero(sizes[:, 0])
        frames[whole] = self._frames(sizes[whole], whole, count, key)
        stored = frames.tolist()
        ends = list(itertools.accumulate(h * w * channels for h, w, *_ in stored))
        pixels = allocate(ends[-1])
        targets = [
            pixels[end - h * w * channels : end].reshape(h, w, channels)
            for end, (h, w, *_) in zip(ends, stored, strict=True)
        ]

        def write(i: int) -> None:
            height, width, _, _, factor, left, top = stored[i]
            image, target = opened[i], targets[i]
            try:
                if not sizes[i, 0]:
                    target[:] = image
                elif (
                    isinstance(image, Jpeg)
                    and factor <= 8
                    and (height, width) == size_after(image, factor)
                ):
                    fill(target, image, factor)
                else:
                    large = reduced(image, factor, channels)
                    target[:] = large[top : top + height, left : left + width]
            except BadSample as error:
                bad[i] = str(error)

        self._each(count, write, alone=alone)
        return Decoded(pixels, frames, bad, _slowest((place[0] for place in places), seconds))

    def one(
        self, byte_range: tuple[int, int, int, int], place: int, count: int, key: Key
    ) -> tuple[Pixels, Frames]:
        """Image `place` of a micro-batch of `count`: uint8 [H, W, C], and its frame [1].

        Raises BadSample.
        """
        image = open_pixels(self._read(byte_range), self.source.channels)
        frame, pixels = self._stored(image, place, count, key)
        return pixels, frame

    def _frames(
        self, sizes: npt.NDArray[np.int64], places: npt.NDArray[np.int64], count: int, key: Key
    ) -> Frames:
        view, image_size = self.source.view, self.source.image_size
        if view is not None and len(places):
            return view.frames(sizes, places, count, LONGEST * image_size, *key)
        factors = [whole_factor(h, w, image_size) for h, w in sizes.tolist()]
        return whole_frames(sizes, np.array(factors, np.int64))

    def _stored(
        self, image: Jpeg | Pixels, place: int, count: int, key: Key
    ) -> tuple[Frames, Pixels]:
        """The frame [1] of an image, and the pixels that belong into it. Raises BadSample."""
        size = image[:2] if isinstance(image, Jpeg) else image.shape[:2]
        frames = self._frames(np.array([size]), np.array([place]), count, key)
        height, width, _, _, factor, left, top = frames[0].tolist()
        pixels = reduced(image, factor, self.source.channels)
        return frames, pixels[top : top + height, left : left + width]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _remember(self, byte_range: tuple[int, ...], image: Jpeg | Pixels) -> None:
        if not isinstance(image, Jpeg) and image.nbytes <= min(_SMALL, self._room):
            self._room -= image.nbytes
            self._remembered[byte_range] = image

    def _read(self, byte_range: tuple[int, int, int, int]) -> bytes:
        size = byte_range[2]
        if size > MAX_BYTES:
            raise BadSample(f"{size:,} encoded bytes; the limit is {MAX_BYTES:,}")
        return self._reader.read(*byte_range)

    def _each(self, count: int, work: Callable[[int], None], *, alone: bool) -> None:
        """Call work(0) ... work(count - 1), whichever thread is free the next one."""
        left = itertools.count()

        def run() -> None:
            while (i := next(left)) < count:  # next() of a count is atomic
                work(i)

        if self._pool is None or alone:
            run()
            return
        helping = [self._pool.submit(run) for _ in range(self.source.threads - 1)]
        run()
        for done in helping:
            done.result()


def _slowest(shards: Iterable[int], seconds: Iterable[float]) -> tuple[int, float]:
    """The shard whose samples took longest to read, together, and how long."""
    sums: dict[int, float] = {}
    for shard, spent in zip(shards, seconds, strict=True):
        sums[shard] = sums.get(shard, 0.0) + spent
    return max(sums.items(), key=itemgetter(1))


_NOTHING = np.zeros((0, 0, 1), np.uint8)
