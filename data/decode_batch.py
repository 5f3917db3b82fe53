"""Reading and decoding a whole micro-batch into one stretch of memory. No torch.

Pixels are packed: one image after another, without padding. JPEGs are decoded right where
they will be read, so nothing is written twice, and a portrait among landscapes costs no
more memory than it has pixels.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigbatch.data.decode import MAX_BYTES, Jpeg, Pixels, decode, fill, open_pixels
from bigbatch.data.read import BadSample, ShardReader
from bigbatch.data.staging import Cache, Remote

# Where the encoded bytes of a sample lie: columns of the index.
EXTENT = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])
Extents = npt.NDArray[np.void]  # [B], of dtype EXTENT


@dataclass(frozen=True)
class Decoded:
    """Images one after another, each in rows of pixels."""

    pixels: npt.NDArray[np.uint8]  # [sum of height * width * channels]
    sizes: npt.NDArray[np.int32]  # [B, 2]: height, width; 0, 0 for a bad one
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

    def reader(self) -> ShardReader:
        if self.remote is None:
            return ShardReader([self.root / name for name in self.shards])
        cache = Cache(Path(self.remote.cache), self.remote.limit)
        return ShardReader([self.remote.shard(name) for name in self.shards], cache)


class BatchDecoder:
    """Reads and decodes with a few threads: simplejpeg and pread let the others run."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._reader = source.reader()
        self._pool = ThreadPoolExecutor(source.threads - 1) if source.threads > 1 else None

    def decode(self, extents: Extents, allocate: Callable[[int], Pixels]) -> Decoded:
        """Decode a batch into the uint8 array that `allocate` makes for so many bytes.

        Raises UserError for a shard that cannot be read.
        """
        places = extents.tolist()
        opened: list[Jpeg | Pixels] = [_NOTHING] * len(places)
        sizes = np.zeros((len(places), 2), np.int32)
        bad: dict[int, str] = {}
        seconds = np.zeros(len(places))

        def read(i: int) -> None:
            try:
                image = opened[i] = self._open(places[i], seconds[i : i + 1])
            except BadSample as error:
                bad[i] = str(error)
            else:
                sizes[i] = image[:2] if isinstance(image, Jpeg) else image.shape[:2]

        self._each(len(places), read)
        channels = self.source.channels
        ends = (np.cumsum(sizes.prod(axis=1, dtype=np.int64)) * channels).tolist()
        pixels = allocate(ends[-1])

        def write(i: int) -> None:
            image = opened[i]
            height, width = sizes[i]
            start = ends[i] - int(height) * int(width) * channels
            target = pixels[start : ends[i]].reshape(height, width, channels)
            if isinstance(image, Jpeg):
                try:
                    fill(target, image, channels)
                except BadSample as error:
                    bad[i] = str(error)
            else:
                target[:] = image

        self._each(len(places), write)
        return Decoded(pixels, sizes, bad, _slowest(extents["shard"], seconds))

    def one(self, extent: tuple[int, int, int, int]) -> Pixels:
        """Decode one image, uint8 [H, W, C]. Raises BadSample."""
        self._check_size(extent[2])
        data = self._reader.read(*extent)
        return decode(data, image_size=self.source.image_size, channels=self.source.channels)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _open(
        self, extent: tuple[int, int, int, int], seconds: npt.NDArray[np.float64]
    ) -> Jpeg | Pixels:
        """Open one image; the time that its bytes took goes into seconds[0]."""
        self._check_size(extent[2])
        started = time.perf_counter()
        data = self._reader.read(*extent)
        seconds[0] = time.perf_counter() - started
        return open_pixels(data, image_size=self.source.image_size, channels=self.source.channels)

    def _check_size(self, size: int) -> None:
        if size > MAX_BYTES:
            raise BadSample(f"{size:,} encoded bytes; the limit is {MAX_BYTES:,}")

    def _each(self, count: int, work: Callable[[int], None]) -> None:
        """Call work(0) ... work(count - 1), whichever thread is free the next one."""
        left = itertools.count()

        def run() -> None:
            while (i := next(left)) < count:  # next() of a count is atomic
                work(i)

        if self._pool is None:
            run()
            return
        helping = [self._pool.submit(run) for _ in range(self.source.threads - 1)]
        run()
        for done in helping:
            done.result()


def _slowest(shards: npt.NDArray[np.uint32], seconds: npt.NDArray[np.float64]) -> tuple[int, float]:
    """The shard whose samples took longest to read, together, and how long."""
    names, places = np.unique(shards, return_inverse=True)
    sums = np.bincount(places, seconds)
    worst = int(sums.argmax())
    return int(names[worst]), float(sums[worst])


_NOTHING = np.zeros((0, 0, 1), np.uint8)
