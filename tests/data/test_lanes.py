"""Lanes: every sample once an epoch, the same at any world size, each shard on few ranks."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import parse_recipe
from bigbatch.data.index import Index, ShardFile
from bigbatch.data.lanes import LaneOrder


def index_of(counts):
    """An index of shards with these numbers of samples; there are no files behind it."""
    total = sum(counts)
    return Index(
        root=Path("nowhere"),
        shard=np.repeat(np.arange(len(counts)), counts).astype(np.uint32),
        offset=np.zeros(total, np.uint64),
        size=np.zeros(total, np.uint32),
        label=np.zeros(total, np.int32),
        crc=np.zeros(total, np.uint32),
        class_starts=np.array([0, total]),
        class_members=np.arange(total, dtype=np.uint32),
        classes=("only",),
        shards=tuple(ShardFile(f"{i:06d}.tar", 1, n) for i, n in enumerate(counts)),
        problems=(),
        passed_over={},
        hash=f"hash of {counts}",
    )


@st.composite
def cases(draw):
    """Shards of unequal sizes, some empty; lanes, window and micro-batch that fit them."""
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=30))
    counts[0] = max(1, counts[0])
    lanes = draw(st.integers(1, min(8, sum(counts) // max(counts))))
    return counts, lanes, draw(st.integers(1, 6)), draw(st.integers(1, 9))


def order_of(counts, lanes, window, micro_batch, seed=3):
    return LaneOrder(index_of(counts), seed, lanes=lanes, window=window, micro_batch=micro_batch)


def stretch(order, epochs):
    """Positions that hold all of the first `epochs` epochs, whichever lane is behind."""
    row = order.lanes * order.micro_batch
    return np.arange((epochs * order.epoch_samples // row + 2) * row)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_every_epoch_holds_every_sample_once(case):
    order = order_of(*case)
    positions = stretch(order, 4)
    samples, epochs = order.samples(positions), order.epochs(positions)
    for epoch in range(4):
        assert np.array_equal(np.sort(samples[epochs == epoch]), np.arange(order.epoch_samples))


@given(cases())
@settings(max_examples=50, deadline=None)
def test_epochs_of_a_lane_follow_each_other_and_lanes_keep_step(case):
    order = order_of(*case)
    positions = stretch(order, 4)
    epochs = order.epochs(positions).reshape(-1, order.lanes, order.micro_batch)
    by_lane = epochs.transpose(1, 0, 2).reshape(order.lanes, -1)
    assert (np.diff(by_lane) >= 0).all()
    for epoch in range(1, 4):
        begins = (by_lane < epoch).sum(axis=1)
        assert begins.max() - begins.min() <= 1


@given(cases(), st.integers(0, 10**12), st.randoms())
@settings(max_examples=100, deadline=None)
def test_a_position_needs_no_other(case, far, random):
    order, positions = order_of(*case), np.arange(50)
    shuffled = positions.copy()
    random.shuffle(shuffled)
    samples = order.samples(positions)
    assert np.array_equal(order.samples(shuffled), samples[shuffled])
    assert [int(order_of(*case).samples(np.array([p]))[0]) for p in range(0, 50, 7)] == samples[
        ::7
    ].tolist()
    assert 0 <= order.samples(np.array([far]))[0] < order.epoch_samples


@given(cases())
@settings(max_examples=50, deadline=None)
def test_what_is_upcoming_is_what_a_lane_reads(case):
    order = order_of(*case)
    positions = stretch(order, 2)
    shards = order.index.shard[order.samples(positions)]
    for position in positions[:: max(1, len(positions) // 30)].tolist():
        assert shards[position] in order.upcoming(position)


def test_windows_come_one_after_another_and_are_known_in_advance():
    order = order_of([100] * 24, lanes=2, window=3, micro_batch=10)
    first, second = order.upcoming(0)[:3], order.upcoming(0)[3:6]
    lane = np.arange(1200).reshape(-1, 20)[:, :10].ravel()  # micro-batches 0, 2, 4 ...
    shards = order.index.shard[order.samples(lane)]
    assert set(shards[:300].tolist()) == set(first)
    assert set(shards[300:600].tolist()) == set(second)
    # Shuffled inside: no shard is read from end to end before the next one.
    assert len(set(shards[:20].tolist())) > 1


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_keep_their_lanes_and_a_shard_is_on_at_most_two(world):
    micro_batches, micro_batch = 16, 4
    rng = np.random.default_rng(world)
    order = order_of(rng.integers(20, 80, 60).tolist(), 8, 3, micro_batch)
    readers = defaultdict(set)
    together = {}
    for rank in range(world):
        for step in range(3 * order.epoch_samples // (micro_batches * micro_batch)):
            for micro in range(rank, micro_batches, world):
                start = (step * micro_batches + micro) * micro_batch
                positions = np.arange(start, start + micro_batch)
                samples, epochs = order.samples(positions), order.epochs(positions)
                together[step, micro] = samples.tolist()
                for epoch, shard in zip(epochs, order.index.shard[samples], strict=True):
                    readers[int(epoch), int(shard)].add(rank)
    assert max(map(len, readers.values())) <= min(world, 2)
    # At most one shard is cut between one rank's lanes and another's, at each lane's edge.
    cut = sum(len(ranks) > 1 for (epoch, _), ranks in readers.items() if epoch == 0)
    assert cut <= order.lanes - 1
    flat = [s for place in sorted(together) for s in together[place]]
    assert flat == order.samples(np.arange(len(flat))).tolist()


def test_seeds_epochs_lanes_and_windows_are_all_different_orders():
    positions = np.arange(1000)
    counts = [50] * 40

    def first(**changes):
        return order_of(counts, **{"lanes": 4, "window": 2, "micro_batch": 8, **changes})

    base = first()
    others = [first(seed=4), first(lanes=2), first(window=3), first(micro_batch=4)]
    for other in others:
        assert not np.array_equal(other.samples(positions), base.samples(positions))
    assert len({base.hash, *(o.hash for o in others)}) == 5
    again = base.samples(positions + 2000)
    assert not np.array_equal(np.sort(base.samples(positions)), np.sort(again))


def test_lanes_too_many_for_the_shards_are_refused():
    with pytest.raises(UserError, match=r"data.lanes = 4 .* set data.lanes to 3 or less"):
        order_of([10, 10, 10], lanes=4, window=1, micro_batch=1)


RECIPE = {"duration": "1 epochs", "model": {"name": "x"}, "optimizer": {"name": "sgd", "lr": 1}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"lanes": 3}, "data.lanes = 3 does not divide the 4 micro-batches of a step"),
        ({"lanes": 4, "sampling": "balanced"}, "data.lanes = 4 .* uniform, not balanced"),
    ],
)
def test_recipes_that_lanes_do_not_fit_are_refused(data, message):
    with pytest.raises(UserError, match=message):
        parse_recipe({**RECIPE, "data": {"path": "x", **data}}, "test")
