"""Decoding of an evaluation that begins before its process has imported torch. No torch.

To import torch and timm keeps one core busy for longer than a small split takes to decode.
"""

from collections import deque

import numpy as np

from bigbatch.configs.errors import UserError
from bigbatch.data.decode_batch import BYTE_RANGE, ByteRanges, Decoded, Key, Source
from bigbatch.data.index import Index
from bigbatch.data.order import Positions
from bigbatch.data.workers import WorkerPool

AHEAD = 2  # micro-batches that each worker has in hand, beside the trainer's
_MEMORY = 256 * 2**20  # bytes that images may take before anybody asks for them
_BATCHES = 64  # at most, beside what workers have in hand: each keeps two files open


class Begun:
    """A WorkerPool that was given the first of a rank's batches; `eval_batches` goes on with it.

    Who claims it submits the same batches once more, which are then not decoded again.
    """

    def __init__(
        self, index: Index, source: Source, workers: int, *, batch: int, rank: int, world: int
    ) -> None:
        self._source = source
        self._workers = workers
        self._pool = WorkerPool(source, workers)
        self._given: deque[tuple[ByteRanges, Key]] = deque()
        self._claimed = self._received = False
        # An image is decoded at about twice the size that is asked for (decode.py).
        taken = 4 * source.image_size**2 * source.channels * batch
        count = max(AHEAD * workers + 1, min(_MEMORY // taken, _BATCHES))
        for number in range(rank, -(-len(index) // batch), world)[:count]:
            samples = np.arange(number * batch, min((number + 1) * batch, len(index)))
            self._given.append((byte_ranges(index, samples), (0, number)))
            self._pool.submit(*self._given[-1])

    def claim(self, source: Source) -> bool:
        """Whether it decodes images of `source`: yes but once, to whom they then belong."""
        if self._claimed or source != self._source:
            return False
        self._claimed = True
        return True

    def submit(self, byte_ranges: ByteRanges, key: Key) -> None:
        """Give the pool a batch that it has not. Raises UserError where the index has changed."""
        if self._given:
            given, its_key = self._given.popleft()
            if its_key == key and np.array_equal(given, byte_ranges):
                return
            if self._received:
                raise UserError(f"{self._source.root} has changed while it was read; start again")
            self._given.clear()
            self._pool.close()
            self._pool = WorkerPool(self._source, self._workers)
        self._pool.submit(byte_ranges, key)

    def receive(self) -> Decoded:
        self._received = True
        return self._pool.receive()

    def close(self) -> None:
        self._pool.close()


def byte_ranges(index: Index, samples: Positions) -> ByteRanges:
    """Where the samples' images lie in their shards."""
    found = np.empty(len(samples), BYTE_RANGE)
    for name in BYTE_RANGE.names or ():
        found[name] = getattr(index, name)[samples]
    return found
