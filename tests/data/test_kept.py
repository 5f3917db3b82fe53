"""Batches that are gone through again are those of the first pass, and read no shard."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from bigbatch.data.batch import Decoding, MicroBatch
from bigbatch.data.kept import MOST_BYTES, KeptBatches
from bigbatch.data.loader import eval_batches
from tests.helpers.micro_batches import COUNTS, SIZE, content


class Passes:
    """Counts how often batches are made."""

    def __init__(self, index: Any, workers: int = 0) -> None:
        self.made = 0
        self._index, self._decoding = index, Decoding(SIZE, 3, workers=workers, threads=1)

    def __call__(self, count: int = 99) -> Any:
        self.made += 1
        for number, batch in enumerate(
            eval_batches(self._index, self._decoding, batch=4, rank=0, world=1)
        ):
            if number < count:
                yield batch


def batches(kept: KeptBatches, passes: Passes, count: int) -> list[Any]:
    return [content(batch) for batch in kept.through(lambda: passes(count), count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_pass_and_shorter_ones_are_the_first_one(index: Any, workers: int) -> None:
    kept, passes, whole = KeptBatches(), Passes(index, workers), -(-sum(COUNTS) // 4)
    expected = batches(KeptBatches(), Passes(index), whole)
    assert len(expected) == whole
    for count in (2, whole, whole, 3, 0):  # longer than what is kept: all is made anew
        assert batches(kept, passes, count) == expected[:count]
    assert passes.made == 2


def test_what_takes_many_bytes_is_made_anew(index: Any) -> None:
    whole = -(-sum(COUNTS) // 4)
    size = sum(batch.pixels.numel() for batch in Passes(index)())
    assert size < MOST_BYTES
    for most, made in ((size, 1), (size - 1, 2)):
        kept, passes = KeptBatches(most), Passes(index)
        assert batches(kept, passes, whole) == batches(kept, passes, whole)
        assert passes.made == made
        assert kept.most == (size if made == 1 else 0)  # nothing is copied once it was too much


def test_a_pass_that_breaks_off_is_not_kept(index: Any) -> None:
    kept, passes, whole = KeptBatches(), Passes(index), -(-sum(COUNTS) // 4)
    for _ in kept.through(passes, whole):
        break
    assert len(batches(kept, passes, whole)) == whole
    assert passes.made == 2


def test_pixels_are_its_own(index: Any) -> None:
    """What a caller's memory holds next does not change them."""
    batch = next(Passes(index)())
    memory = batch.pixels.clone()
    given: MicroBatch = replace(batch, pixels=memory)
    kept, before = KeptBatches(), content(batch)
    list(kept.through(lambda: iter([given]), 1))
    memory.zero_()
    (again,) = kept.through(lambda: iter([]), 1)
    assert content(again) == before
    assert torch.equal(again.pixels, batch.pixels)
