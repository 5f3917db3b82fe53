"""The order of samples: exact quotas, even use, and the same answer however it is asked."""

import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from bigbatch.configs.errors import UserError
from bigbatch.configs.sampling import Sampling
from bigbatch.data.index import Index, ShardFile
from bigbatch.data.order import (
    _bit_length,
    build_order,
    class_quotas,
    largest_remainder,
    permute,
)
from bigbatch.data.rng import key64

LONG_TAIL = (500, 200, 0, 80, 31, 12, 5, 1)
EASY_ENSEMBLE = {"name": "easy_ensemble", "member": 2, "ratio": 3}
CLASS_QUOTAS = (
    "balanced",
    {"name": "tempered", "alpha": 0.5},
    {"name": "progressive", "epochs": 4},
    "label_shuffling",
    {"name": "repeat_factor", "threshold": 0.1},
    EASY_ENSEMBLE,
)
POLICIES = ("uniform", *CLASS_QUOTAS)  # `weights` needs a file


def sampling(policy):
    return TypeAdapter(Sampling).validate_python(policy)


def index_of(counts, root=Path("nowhere"), digest="hash"):
    """An index in memory with counts[c] samples of class c, in a mixed order."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    labels = labels[np.argsort([key64("place", i) for i in range(len(labels))])]
    empty = np.zeros(len(labels), np.uint32)
    return Index(
        root=root,
        shard=empty,
        offset=empty.astype(np.uint64),
        size=empty,
        label=labels,
        crc=empty,
        class_starts=np.cumsum([0, *counts]),
        class_members=np.argsort(labels, kind="stable").astype(np.uint32),
        classes=tuple(map(str, range(len(counts)))),
        shards=(ShardFile("000000.tar", 0, len(labels)),),
        problems=(),
        passed_over={},
        hash=digest,
    )


def order_of(policy, counts=LONG_TAIL, seed=0):
    return build_order(sampling(policy), index_of(counts), seed)


def epoch_of(order, epoch):
    size = order.epoch_samples
    return order.samples(np.arange(epoch * size, (epoch + 1) * size))


def whole(size, key):
    return permute(np.arange(size, dtype=np.uint64), np.uint64(size), np.uint64(key))


# The permutation.


def test_every_size_up_to_3000_is_permuted():
    for size in range(1, 3001):
        seen = np.bincount(whole(size, size * 7919).astype(np.int64), minlength=size)
        assert (seen == 1).all(), size


@pytest.mark.parametrize("power", range(12, 19))
def test_sizes_around_powers_of_two_are_permuted(power):
    for size in range(2**power - 2, 2**power + 3):
        assert (np.bincount(whole(size, power).astype(np.int64), minlength=size) == 1).all()


@given(st.integers(1, 2**50), st.integers(0, 2**64 - 1), st.data())
def test_huge_sizes_stay_in_range_and_do_not_collide(size, key, data):
    values = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=200, unique=True))
    result = permute(np.array(values, np.uint64), np.uint64(size), np.uint64(key))
    assert result.max() < size
    assert len(set(result.tolist())) == len(values)


def test_sizes_and_keys_may_differ_by_element():
    sizes = np.array([1, 2, 3, 64, 65, 1000], np.uint64)
    keys = np.arange(6, dtype=np.uint64) * np.uint64(12345)
    values = np.array([0, 1, 2, 63, 64, 999], np.uint64)
    together = permute(values, sizes, keys)
    for i in range(6):
        assert together[i] == permute(values[i : i + 1], sizes[i], keys[i])[0]


def test_bit_length_is_exact():
    values = [0, 1, *(2**k + d for k in range(2, 53) for d in (-1, 0))]
    expected = [v.bit_length() for v in values]
    assert _bit_length(np.array(values, np.uint64)).tolist() == expected


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_permutations_of_a_few_are_equally_likely(size):
    kinds = list(permutations(range(size)))
    draws = 300 * len(kinds)
    seen = Counter(tuple(whole(size, key64("test", k)).tolist()) for k in range(draws))
    excess = sum((seen[k] - 300) ** 2 / 300 for k in kinds)  # chi-square, len(kinds) - 1 degrees
    assert excess < len(kinds) - 1 + 5 * np.sqrt(2 * len(kinds))


@pytest.mark.parametrize("size", [5, 33, 100])
def test_each_value_comes_to_each_place_equally_often(size):
    draws = 1000
    where = np.stack([whole(size, key64("place", k)).astype(np.int64) for k in range(draws)])
    counts = np.zeros((size, size))
    np.add.at(counts, (np.broadcast_to(np.arange(size), where.shape), where), 1)
    expected = draws / size
    excess = ((counts - expected) ** 2 / expected).sum()
    degrees = (size - 1) ** 2
    assert abs(excess - degrees) < 5 * np.sqrt(2 * degrees)


# The stream must never change: a run that is resumed with a later version goes on in it.


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("uniform", [528, 770, 258, 307, 706, 569, 379, 527]),
        ("balanced", [571, 376, 746, 788, 112, 97, 501, 635]),
        ({"name": "progressive", "epochs": 4}, [221, 591, 278, 621, 432, 412, 437, 379]),
    ],
)
def test_golden_samples(policy, expected):
    positions = np.array([0, 1, 2, 828, 829, 830, 10**9, 10**15])
    assert order_of(policy).samples(positions).tolist() == expected


# Quotas.


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=50).filter(lambda w: sum(w) > 1e-3),
    st.integers(0, 10**7),
)
def test_largest_remainder_is_exact_and_fair(weights, total):
    array = np.array(weights)
    quotas = largest_remainder(array, total)
    assert quotas.sum() == total
    assert (np.abs(quotas - array / array.sum() * total) < 1 + 1e-6).all()


counts_strategy = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any)


@given(counts_strategy, st.sampled_from(CLASS_QUOTAS), st.integers(0, 6), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_label_counts_and_use_are_exact_in_every_epoch(counts, policy, epoch, seed):
    order = order_of(policy, counts, seed)
    samples = epoch_of(order, epoch)
    quotas = class_quotas(sampling(policy), np.array(counts), epoch)
    assert quotas.sum() == order.epoch_samples == len(samples)
    labels = order.index.label[samples]
    assert (np.bincount(labels, minlength=len(counts)) == quotas).all()
    used = np.bincount(samples, minlength=len(order.index))
    for label, count in enumerate(counts):
        if count and policy != EASY_ENSEMBLE:
            own = used[order.index.label == label]
            assert own.min() >= quotas[label] // count
            assert own.max() <= -(-quotas[label] // count)
        elif count:  # easy ensemble: each sample of the subset once
            assert used[order.index.label == label].max() == 1


@pytest.mark.parametrize("policy", [p for p in CLASS_QUOTAS if p != EASY_ENSEMBLE], ids=str)
def test_use_stays_even_over_epochs(policy):
    order = order_of(policy)
    used = np.zeros(len(order.index), np.int64)
    for epoch in range(7):
        used += np.bincount(epoch_of(order, epoch), minlength=len(used))
        for label in np.unique(order.index.label):
            own = used[order.index.label == label]
            assert own.max() - own.min() <= 1, (epoch, label)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_epochs_and_seeds_differ_and_keys_do_not_collide(policy):
    first = epoch_of(order_of(policy), 0)
    assert not np.array_equal(first, epoch_of(order_of(policy), 1))
    assert not np.array_equal(first, epoch_of(order_of(policy, seed=1), 0))
    # (seed 1, epoch 0) is not (seed 0, epoch 1).
    other = epoch_of(order_of(policy), 1)
    assert not np.array_equal(epoch_of(order_of(policy, seed=1), 0), other)


@given(st.sampled_from(POLICIES), st.data())
@settings(max_examples=60, deadline=None)
def test_the_answer_does_not_depend_on_how_it_is_asked(policy, data):
    order = order_of(policy)
    stop = 5 * order.epoch_samples
    asked = data.draw(st.lists(st.integers(0, stop), min_size=1, max_size=40))
    together = order.samples(np.array(asked))
    fresh = order_of(policy)  # another process, which knows nothing of earlier questions
    one_by_one = [int(fresh.samples(np.array([p]))[0]) for p in reversed(asked)]
    assert together.tolist() == one_by_one[::-1]
    assert order.epochs(np.array(asked)).tolist() == [p // order.epoch_samples for p in asked]


def test_uniform_uses_each_sample_once_an_epoch():
    order = order_of("uniform")
    for epoch in (0, 1, 10**6):
        assert sorted(epoch_of(order, epoch)) == list(range(len(order.index)))


def test_quotas_of_each_policy():
    counts = np.array([600, 300, 90, 0, 10])

    def quotas(policy, epoch=0):
        return class_quotas(sampling(policy), counts, epoch).tolist()

    assert quotas("balanced") == [250, 250, 250, 0, 250]
    assert quotas({"name": "tempered", "alpha": 1}) == counts.tolist()
    assert quotas({"name": "tempered", "alpha": 0}) == quotas("balanced")
    roots = np.sqrt(counts)
    assert quotas("tempered") == largest_remainder(roots, 1000).tolist()
    assert quotas("label_shuffling") == [600, 600, 600, 0, 600]
    progressive = {"name": "progressive", "epochs": 3}
    assert quotas(progressive) == counts.tolist()
    assert quotas(progressive, 1) == [425, 275, 170, 0, 130]
    assert quotas(progressive, 2) == quotas(progressive, 99) == quotas("balanced")
    # Shares 0.6, 0.3, 0.09 and 0.01: factors 1, 1, sqrt(0.25 / 0.09) and 5.
    assert quotas({"name": "repeat_factor", "threshold": 0.25}) == [600, 300, 150, 0, 50]
    assert quotas({"name": "easy_ensemble", "member": 7, "ratio": 12}) == [120, 120, 90, 0, 10]


def test_every_class_is_drawn_even_with_as_many_classes_as_samples():
    for policy in POLICIES:
        assert set(epoch_of(order_of(policy, [1] * 50), 0)) == set(range(50))


def test_easy_ensemble_members_share_nothing_until_a_class_is_used_up():
    counts = (100, 40, 10)
    members = [order_of({"name": "easy_ensemble", "member": m}, counts) for m in range(10)]
    subsets = [set(epoch_of(m, 0).tolist()) for m in members]
    assert all(set(epoch_of(m, 5).tolist()) == s for m, s in zip(members, subsets, strict=True))
    label = members[0].index.label
    for c, count in enumerate(counts):
        used = Counter(s for subset in subsets for s in subset if label[s] == c)
        assert len(used) == count
        assert set(used.values()) == {100 // count} or c == 1
        assert max(used.values()) - min(used.values()) <= 1


# Weights.


def weighted(tmp_path, weights, name="weights.parquet", keys=None):
    """An order by per-sample weights, read from a file."""
    names = [f"{i:04d}" for i in range(len(weights))]
    rows = {"key": keys or names[::-1], "weight": weights[: len(keys or names)][::-1]}
    path = tmp_path / name
    if path.suffix == ".csv":
        lines = [f"{k},{w!r}" for k, w in zip(rows["key"], rows["weight"], strict=True)]
        path.write_text("\n".join(["key,weight", *lines]) + "\n")
    else:
        pq.write_table(pa.table(rows), path)
    policy = sampling({"name": "weights", "file": str(path)})
    with patch.object(Index, "keys", lambda self: names):
        return build_order(policy, index_of([len(weights)]), 0)


def test_weights_are_floor_or_ceil_in_an_epoch_and_exact_in_the_long_run(tmp_path):
    weights = np.random.default_rng(0).exponential(size=200)
    weights[17] = 0
    order = weighted(tmp_path, weights.tolist())
    expected = weights / weights.mean()
    total = np.zeros(200)
    for epoch in range(300):
        used = np.bincount(epoch_of(order, epoch), minlength=200)
        assert (used >= np.floor(expected - 1e-4)).all()
        assert (used <= np.ceil(expected + 1e-4)).all()
        total += used
    # A random draw of each remainder would be off by 5 here (three standard deviations: 26).
    assert np.abs(total - 300 * expected).max() < 4
    assert total[17] == 0


def test_equal_weights_are_uniform_and_csv_is_read(tmp_path):
    order = weighted(tmp_path, [2.5] * 50, "weights.csv")
    for epoch in range(3):
        assert sorted(epoch_of(order, epoch)) == list(range(50))
    again = weighted(tmp_path, [2.5] * 50, "elsewhere.parquet")
    assert again.hash == order.hash  # the same weights, wherever they lie
    assert weighted(tmp_path, [2.5] * 49 + [1.0]).hash != order.hash


@pytest.mark.parametrize(
    ("weights", "keys", "message"),
    [
        ([1.0, -1.0], None, "-1.0"),
        ([1.0, float("nan")], None, "nan"),
        ([0.0, 0.0], None, "not all 0"),
        ([1.0, 1.0], ["0000"], "no weight for 1 of 2"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(tmp_path, weights, keys, message):
    with pytest.raises(UserError, match=message):
        weighted(tmp_path, weights, keys=keys)


def test_a_file_without_weights_is_refused(tmp_path):
    (tmp_path / "no.parquet").write_text("text")
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    for name in ("no.parquet", "no.csv", "missing.parquet", "missing.csv"):
        policy = sampling({"name": "weights", "file": str(tmp_path / name)})
        with pytest.raises(UserError, match="columns `key` and `weight`"):
            build_order(policy, index_of([2]), 0)


# Substitutes, and identity.


@given(counts_strategy, st.integers(0, 10**9), st.data())
@settings(max_examples=100, deadline=None)
def test_substitutes_are_all_others_of_the_class(counts, position, data):
    order = order_of("uniform", counts)
    labels = order.index.label
    sample = data.draw(st.integers(0, len(labels) - 1))
    own = set(np.flatnonzero(labels == labels[sample]).tolist()) - {sample}
    others = own or set(range(len(labels))) - {sample} or {sample}
    found = [order.substitute(sample, position, a) for a in range(len(others))]
    assert set(found) == others
    assert found == [order.substitute(sample, position, a) for a in range(len(others))]


def test_hash_names_policy_seed_and_index():
    def digest(policy, seed=0, index="a"):
        return build_order(sampling(policy), index_of([5], digest=index), seed).hash

    kinds = [digest(p) for p in POLICIES] + [digest("uniform", 1), digest("uniform", 0, "b")]
    assert len(set(kinds)) == len(kinds)
    assert digest("uniform") == digest({"name": "uniform"})


def test_order_and_workers_are_free_of_torch():
    code = (
        "import sys, bigbatch.data.order, bigbatch.data.workers; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
