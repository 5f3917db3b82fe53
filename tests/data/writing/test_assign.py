import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bigbatch.configs.errors import UserError
from bigbatch.data.writing.assign import (
    assign_splits,
    doubts,
    largest_remainder,
    plan_shards,
)
from bigbatch.data.writing.sources import Source


def source(
    labels: list[int],
    keys: list[str] | None = None,
    splits: list[str] | None = None,
    groups: list[int] | None = None,
    window: int = 1,
) -> Source:
    def read(i: int) -> bytes:
        raise AssertionError("planning reads no image")

    return Source(
        keys=keys or [f"{i:04d}" for i in range(len(labels))],
        labels=np.array(labels, np.int32),
        classes=tuple(map(str, range(max(labels) + 1))),
        read=read,
        splits=None if splits is None else np.array(splits),
        groups=None if groups is None else np.array(groups),
        window=window,
    )


FRACTIONS = st.lists(st.integers(1, 20), min_size=1, max_size=3).map(
    lambda parts: [p / sum(parts) for p in parts]
)


@given(st.integers(0, 10_000), FRACTIONS)
def test_largest_remainder(total: int, fractions: list[float]) -> None:
    counts = largest_remainder(total, fractions)
    assert sum(counts) == total
    assert all(abs(c - total * f) < 1 for c, f in zip(counts, fractions, strict=True))


def test_largest_remainder_known() -> None:
    assert largest_remainder(178, (0.6, 0.2, 0.2)) == [107, 36, 35]
    assert largest_remainder(1, (0.6, 0.2, 0.2)) == [1, 0, 0]
    assert largest_remainder(10, (0.1, 0.2, 0.7)) == [1, 2, 7]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), FRACTIONS)
def test_each_class_is_divided_by_itself(labels: list[int], fractions: list[float]) -> None:
    splits = assign_splits(source(labels), fractions)
    sums = np.sum([largest_remainder(labels.count(c), fractions) for c in set(labels)], 0)
    assume(sums.all())  # else the classes share their remainders
    for c in set(labels):
        inside = splits[np.array(labels) == c]
        expected = largest_remainder(len(inside), fractions)
        found = [int((inside == name).sum()) for name in ("train", "val", "test")]
        assert found == expected + [0] * (3 - len(expected))


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_split_of_a_sample_follows_from_its_key(random) -> None:  # type: ignore[no-untyped-def]
    labels = {f"key{i}": i % 3 for i in range(60)}
    keys = list(labels)
    random.shuffle(keys)
    plain = assign_splits(source(list(labels.values()), list(labels)), None)
    shuffled = assign_splits(source([labels[k] for k in keys], keys), None)
    assert dict(zip(labels, plain, strict=True)) == dict(zip(keys, shuffled, strict=True))


def test_small_classes_share_their_remainders() -> None:
    labels = [i // 3 for i in range(720)]
    splits = assign_splits(source(labels), None)
    assert [int((splits == name).sum()) for name in ("train", "val", "test")] == [576, 72, 72]
    assert set(np.array(labels)[splits == "train"].tolist()) == set(range(240))
    lacking = [said.partition(" have")[0] for said in doubts(source(labels), splits, None)]
    assert lacking == ["168 of 240 classes"] * 2  # in val, and in test
    single = assign_splits(source(list(range(50))), None)
    assert set(single.tolist()) == {"train"}  # no class is without training samples
    said = doubts(source(list(range(50))), single, None)
    assert [s.partition(":")[0] for s in said] == [
        "no sample is left for val",
        "no sample is left for test",
    ]
    assert "give others with --split" in said[0]
    assert doubts(source(list(range(50))), single, (1.0,)) == []


@given(st.lists(st.integers(0, 60), min_size=1, max_size=150), FRACTIONS)
def test_shared_splits_are_near_their_fractions(labels: list[int], fractions: list[float]) -> None:
    splits = assign_splits(source(labels), fractions)
    classes = len(set(labels))
    for name, fraction in zip(("train", "val", "test"), fractions, strict=False):
        off = abs(int((splits == name).sum()) - fraction * len(labels))
        assert off <= classes + 1  # each class keeps one for training


def test_doubts() -> None:
    one = source([1, 1, 1] * 20)
    assert doubts(one, assign_splits(one, None), None) == [
        "all samples are of one class: there is nothing to tell apart",
        "1 of 2 classes have no sample: 0; class numbers go from 0, do these go from 1?",
    ]
    own = source([0, 1] * 20, splits=["train"] * 20 + ["val"] * 20)
    assert doubts(own, assign_splits(own, None), None) == [
        "the source has no test split: runs will report scores of val alone"
    ]
    gaps = source([0, 1, 4] * 20)
    assert doubts(gaps, assign_splits(gaps, None), None) == ["2 of 5 classes have no sample: 2, 3"]


def test_classes_that_a_split_lacks_are_said() -> None:
    """180 images of 60 classes gave 18 to val, and a run measured nothing of the other 42."""
    small = source([c for c in range(60) for _ in range(3)])
    said = doubts(small, assign_splits(small, None), None)
    assert [line.partition(":")[0] for line in said] == [
        "42 of 60 classes have no sample in val",
        "42 of 60 classes have no sample in test",
    ]
    assert "--split 0.5,0.25,0.25" in said[0]
    assert doubts(small, assign_splits(small, (1.0,)), (1.0,)) == []


def test_own_splits_are_kept_and_a_missing_val_is_taken_from_train() -> None:
    labels = [i % 2 for i in range(120)]
    own = ["train"] * 100 + ["test"] * 20
    splits = assign_splits(source(labels, splits=own), None)
    assert np.unique(splits, return_counts=True)[1].tolist() == [20, 90, 10]  # test train val
    assert (splits[100:] == "test").all()
    splits = assign_splits(source(labels, splits=own), (0.7, 0.3))
    assert np.unique(splits, return_counts=True)[1].tolist() == [20, 70, 30]
    assert (assign_splits(source(labels, splits=own), (1.0,)) == own).all()
    with pytest.raises(UserError, match="the source has its own test split; give 0 for it"):
        assign_splits(source(labels, splits=own), (0.8, 0.1, 0.1))
    imagenet = ["train"] * 100 + ["val"] * 20
    assert (assign_splits(source(labels, splits=imagenet), None) == imagenet).all()
    assert (assign_splits(source(labels, splits=["test"] * 120), None) == "test").all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=150),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 50),
    st.booleans(),
)
def test_each_sample_is_written_once(
    labels: list[int], per_shard: int, window: int, rows: int, grouped: bool
) -> None:
    groups = [i // rows for i in range(len(labels))] if grouped else None
    given_source = source(labels, groups=groups, window=window)
    splits = assign_splits(given_source, None)
    shards = [s for task in plan_shards(given_source, splits, per_shard) for s in task]
    assert sorted(np.concatenate([s.items for s in shards]).tolist()) == list(range(len(labels)))
    for s in shards:
        assert len(s.items) <= per_shard
        assert {str(x) for x in splits[s.items]} == {s.name.partition("/")[0]}
    names = [s.name for s in shards]
    assert names == sorted(set(names), key=names.index)


def test_reading_stays_within_a_window_of_groups() -> None:
    groups = [i // 10 for i in range(1000)]
    given_source = source([i // 100 for i in range(1000)], groups=groups, window=5)
    tasks = plan_shards(given_source, np.full(1000, "train"), 25)
    read = [{groups[i] for s in task for i in s.items} for task in tasks]
    assert [len(task) for task in tasks] == [2] * 20  # 50 samples, as many as a window holds
    assert all(len(r) == 5 for r in read)
    # Sorted by class in the source, mixed in the shards.
    assert min(len(set(given_source.labels[t[0].items].tolist())) for t in tasks) >= 2
    assert np.mean([len(set(given_source.labels[t[0].items].tolist())) for t in tasks]) > 3
