"""Decoded images that are gone through again and again: kept, where they take few bytes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from bigbatch.data.batch import MicroBatch

# Of pixels that a rank keeps. All 5,000 images of CIFAR-10's validation split are 15 MB.
MOST_BYTES = 1 << 26


@dataclass
class KeptBatches:
    """The longest pass so far over batches of which a shorter one makes the first ones."""

    most: int = MOST_BYTES
    _batches: list[MicroBatch] = field(default_factory=list)

    def through(self, make: Callable[[], Iterator[MicroBatch]], count: int) -> Iterator[MicroBatch]:
        """A pass over `count` batches: those that are kept, or what `make` gives, kept if few."""
        if count <= len(self._batches):
            yield from islice(self._batches, count)
            return
        found: list[MicroBatch] | None = []
        left = self.most
        for batch in make():
            left -= batch.pixels.numel()
            if left < 0:
                found, self.most = None, 0  # a next pass is not copied in vain
            if found is not None:
                found.append(_own(batch))
            yield batch
        if found is not None and len(found) == count:
            self._batches = found


def _own(batch: MicroBatch) -> MicroBatch:
    """With pixels of its own: a worker's memory is for the next batch."""
    if batch.pixels.is_pinned():
        return batch
    return replace(batch, pixels=batch.pixels.clone())
