"""Intervals against scipy, classes against scikit-learn."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, recall_score

from bigbatch.trainers.evaluation.accuracy import (
    balanced_accuracy,
    confusion_pairs,
    recalls,
    wilson,
)

LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30)


@given(st.integers(1, 10**6), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_wilson_against_scipy(samples, share, level):
    successes = round(share * samples)
    low, high = wilson(successes, samples, level)
    wanted = binomtest(successes, samples).proportion_ci(level, method="wilson")
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert 0 <= low <= successes / samples <= high <= 1


def test_wilson_by_hand_at_the_ends():
    # z^2 / (n + z^2) with z = 1.959964
    assert wilson(0, 10) == (0.0, pytest.approx(3.841459 / 13.841459, abs=1e-6))
    assert wilson(10, 10) == (pytest.approx(10 / 13.841459, abs=1e-6), 1.0)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("case", [(3, 2, 0.9), (-1, 2, 0.9), (1, 2, 1.0), (1, 2, 0.0)])
def test_no_interval_of_what_is_no_share(case):
    with pytest.raises(ValueError, match="no interval"):
        wilson(*case)


@given(LABELS)
def test_classes_against_scikit_learn(pairs):
    labels, predicted = np.array(pairs).T
    found = recalls(labels, predicted, 6)
    wanted = recall_score(labels, predicted, labels=range(6), average=None, zero_division=np.nan)
    assert found == pytest.approx(wanted, nan_ok=True)
    with warnings.catch_warnings():  # predicted classes that are no label's
        warnings.simplefilter("ignore")
        wanted = balanced_accuracy_score(labels, predicted)
    assert balanced_accuracy(labels, predicted, 6) == pytest.approx(wanted)


@given(LABELS)
def test_pairs_are_the_cells_of_the_matrix(pairs):
    labels, predicted = np.array(pairs).T
    matrix = np.zeros((5, 5), np.int64)
    rows = confusion_pairs(labels, predicted, 5)
    matrix[rows[:, 0], rows[:, 1]] = rows[:, 2]
    assert (matrix == confusion_matrix(labels, predicted, labels=range(5))).all()
    assert (rows[:, 2] > 0).all()
    assert rows[:, :2].tolist() == [list(pair) for pair in sorted(set(pairs))]


def test_a_million_classes_take_no_matrix():
    labels = np.array([999_999, 5, 999_999])
    predicted = np.array([0, 999_998, 0])
    rows = confusion_pairs(labels, predicted, 10**6)
    assert rows.tolist() == [[5, 999_998, 1], [999_999, 0, 2]]


def test_without_samples_nothing_is_defined():
    none = np.empty(0, np.int64)
    assert np.isnan(balanced_accuracy(none, none, 3))
    assert np.isnan(recalls(none, none, 3)).all()
    assert confusion_pairs(none, none, 3).shape == (0, 3)
