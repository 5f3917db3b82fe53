"""Paired comparisons against scipy and exact distributions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bigbatch.trainers.evaluation.paired import McNemar, bootstrap, mcnemar


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_against_scipy(first, second):
    found = McNemar(first, second)
    wanted = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert found.p_value == pytest.approx(wanted, rel=1e-9)
    assert found.p_value == McNemar(second, first).p_value
    assert found.odds == pytest.approx(first / second if second else math.nan, nan_ok=True)


def test_mcnemar_of_many_samples():
    assert McNemar(50_500, 49_500).p_value == pytest.approx(
        stats.binomtest(50_500, 100_000).pvalue, rel=1e-6
    )
    assert McNemar(10_000, 0).p_value == 0.0


def test_mcnemar_counts_who_alone_is_right():
    first, second = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    assert mcnemar(first, second) == McNemar(2, 1)


def test_bootstrap_against_the_exact_distribution():
    # The mean of n draws from {-1, 0, 1} is a difference of multinomial counts; here only
    # {0, 1} occur, so it is binomial.
    values = np.zeros((200, 1))
    values[:60] = 1
    ((low, high),) = bootstrap(values, draws=4000)
    exact = stats.binom(200, 0.3).ppf([0.025, 0.975]) / 200
    assert (low, high) == pytest.approx(exact, abs=0.011)


def test_bootstrap_against_scipy():
    values = np.random.default_rng(0).gamma(2, size=(300, 2)) - 1.8
    found = bootstrap(values, draws=4000)
    for column, interval in zip(values.T, found, strict=True):
        peer = stats.bootstrap(
            (column,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        assert interval == pytest.approx(tuple(peer), abs=0.01)


def test_bootstrap_is_keyed():
    values = np.random.default_rng(0).normal(size=(50, 1))
    assert (bootstrap(values, 1) == bootstrap(values, 1)).all()
    assert (bootstrap(values, 1) != bootstrap(values, 2)).all()
    assert (bootstrap(np.ones((7, 1))) == 1).all()
    with pytest.raises(ValueError, match="needs samples"):
        bootstrap(np.empty((0, 1)))


def test_columns_are_drawn_together():
    values = np.random.default_rng(0).normal(size=(50, 1))
    both = bootstrap(np.concatenate([values, -values], axis=1))
    assert both[0] == pytest.approx(-both[1][::-1])
