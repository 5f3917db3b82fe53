"""Diversity against counting by hand, and curves against means over all subsets."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.trainers.evaluation.calibration import tempered
from bigbatch.trainers.evaluation.diversity import (
    ByNumber,
    calibrated_curve,
    calibrated_nll,
    deep_ensemble_equivalent,
    disagreement,
    double_fault,
    halves,
    q_statistic,
    subsets,
)
from bigbatch.trainers.evaluation.metrics import nll, score
from tests.helpers.predictions import predictions, small_predictions

TABLES = st.integers(1, 20).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1, max_size=4)
)


@given(TABLES)
def test_matrices_by_counting(table):
    predicted = np.array(table)
    correct = predicted == 0
    found = disagreement(predicted), double_fault(correct), q_statistic(correct)
    n = predicted.shape[1]
    for i, j in np.ndindex(len(table), len(table)):
        pairs = list(zip(correct[i].tolist(), correct[j].tolist(), strict=True))
        n11, n00 = pairs.count((True, True)), pairs.count((False, False))
        n10, n01 = pairs.count((True, False)), pairs.count((False, True))
        assert found[0][i, j] == pytest.approx(sum(predicted[i] != predicted[j]) / n)
        assert found[1][i, j] == pytest.approx(n00 / n)
        below = n11 * n00 + n01 * n10
        wanted = (n11 * n00 - n01 * n10) / below if below else math.nan
        assert found[2][i, j] == pytest.approx(wanted, nan_ok=True)


def test_independent_members_have_q_near_0_and_equal_ones_1():
    generator = np.random.default_rng(0)
    correct = generator.random((2, 100_000)) < 0.8
    assert abs(q_statistic(correct)[0, 1]) < 0.02
    assert q_statistic(correct[[0, 0]])[0, 1] == 1


def test_subsets_are_all_or_twenty_distinct_ones():
    for members in (1, 2, 6):
        assert [len(s) for s in subsets(members)] == [
            math.comb(members, k) for k in range(1, members + 1)
        ]
    found = subsets(9, seed=3)
    assert [len(set(s)) for s in found] == [9, 20, 20, 20, 20, 20, 20, 9, 1]
    assert all(len(set(s)) == k for k, of_size in enumerate(found, 1) for s in of_size)
    assert found == subsets(9, seed=3) != subsets(9, seed=4)


@given(small_predictions(members=3))
def test_by_number_is_the_mean_over_subsets(drawn):
    p, labels = drawn
    curve = ByNumber(3)
    curve.add(p[:, :1], labels[:1])
    curve.add(p[:, 1:], labels[1:])
    accuracies, losses = curve.accuracies(), curve.losses()
    for k in (1, 2, 3):
        wanted = [score(p[list(s)].mean(axis=0), labels) for s in combinations(range(3), k)]
        assert accuracies[k - 1].tolist() == [w["accuracy"] for w in wanted]
        assert losses[k - 1] == pytest.approx([w["nll"] for w in wanted])


def test_the_order_of_members_changes_nothing():
    p, labels = predictions(200, 5, members=5)
    curves = [ByNumber(5), ByNumber(5)]
    curves[0].add(p, labels)
    curves[1].add(p[[3, 0, 4, 2, 1]], labels)
    for a, b in zip(curves[0].losses(), curves[1].losses(), strict=True):
        assert np.sort(a) == pytest.approx(np.sort(b))
    for a, b in zip(curves[0].accuracies(), curves[1].accuracies(), strict=True):
        assert np.sort(a).tolist() == np.sort(b).tolist()


def test_halves_are_each_sample_once():
    one, other = halves(11, seed=5)
    assert (len(one), len(other)) == (5, 6)
    assert sorted([*one, *other]) == list(range(11))
    assert halves(11, seed=5)[0].tolist() == one.tolist() != halves(11, seed=6)[0].tolist()


def test_calibrated_nll_forgets_a_temperature():
    (p,), labels = predictions(400, 5, members=1)
    wanted = calibrated_nll(p, labels)
    for temperature in (0.2, 3.0):
        wrong = tempered(p, temperature)
        assert calibrated_nll(wrong, labels) == pytest.approx(wanted, rel=1e-6)
        assert calibrated_nll(wrong, labels) < nll(wrong, labels)
    with pytest.raises(ValueError, match="two samples"):
        calibrated_nll(p[:1], labels[:1])


def test_an_ensemble_of_independent_members_is_its_own_equivalent():
    p, labels = predictions(400, 4, members=4)
    curve = calibrated_curve(p, labels)
    for k, loss in enumerate(curve, 1):
        found = deep_ensemble_equivalent(loss, curve)
        assert (found.members, found.relation) == (pytest.approx(k), "=")
    assert curve[3] == calibrated_nll(p.mean(axis=0), labels)


@pytest.mark.parametrize(
    ("loss", "members", "relation"),
    [
        (0.9, 1.0, "<="),
        (0.8, 1.0, "="),
        (0.7, 1.5, "="),
        (0.6, 2.0, "="),
        (0.55, 2.5, "="),
        (0.5, 3.0, "="),
        (0.49, 4.0, ">="),
    ],
)
def test_equivalents_on_a_line(loss, members, relation):
    # The fourth member hurts: where the curve first reaches a loss counts.
    found = deep_ensemble_equivalent(loss, [0.8, 0.6, 0.5, 0.52])
    assert (found.members, found.relation) == (pytest.approx(members), relation)


@pytest.mark.parametrize(
    ("loss", "curve"), [(0.5, []), (0.5, [0.6]), (0.5, [0.6, 0.7]), (math.nan, [0.6, 0.5]),
                        (0.5, [0.6, math.nan])]
)  # fmt: skip
def test_equivalents_that_cannot_be_said(loss, curve):
    with pytest.raises(ValueError, match=r"no equivalent|no better"):
        deep_ensemble_equivalent(loss, curve)
