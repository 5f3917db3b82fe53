"""Fits, curves and intervals of the critical batch size, where the truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.trainers.advice.critical_batch import (
    curve_of_phases,
    fit_points,
    held_out_errors,
    interval,
    measure_phase,
    noise_and_signal,
    ratio,
)

# MLPerf Training, ResNet-50: reference convergence points, mean epochs to 75.9 % top-1.
MLPERF = {
    1632: 35.0,
    3264: 35.2,
    4096: 40.0,
    8192: 42.0,
    13056: 45.4,
    32768: 56.0,
    49152: 68.0,
    58880: 79.9,
    65536: 84.5,
    67840: 85.9,
}

positive = st.floats(1e-3, 1e3)


@given(positive, positive, st.integers(1, 100), st.integers(2, 100))
def test_noise_and_signal_are_what_the_expected_norms_were_made_of(noise, signal, small, times):
    large = small * times
    found = noise_and_signal(signal + noise / small, signal + noise / large, small, large)
    scale = signal + noise  # of the rounding
    assert found[0] == pytest.approx(noise, rel=1e-6, abs=1e-9 * scale * large)
    assert found[1] == pytest.approx(signal, rel=1e-6, abs=1e-9 * scale)


@settings(deadline=None, max_examples=20)
@given(
    st.floats(1, 100),
    st.floats(100, 1e5),
    st.lists(st.integers(32, 100_000), min_size=3, max_size=8, unique=True),
)
def test_exact_points_are_fitted_exactly(floor, critical, batches):
    batch = np.array(batches, dtype=float)
    curve = fit_points(batch, floor * (1 + batch / critical))
    for b in batches:
        assert curve.cost(b) == pytest.approx(floor * (1 + b / critical), rel=1e-3)


def test_costs_that_do_not_rise_have_no_critical_batch():
    curve = fit_points(np.array([1.0, 2, 4, 8]) * 256, np.array([40.0, 39, 38, 37]))
    assert math.isinf(curve.critical)
    assert curve.floor == pytest.approx((40 * 39 * 38 * 37) ** 0.25)
    low, high = curve.floor_interval
    assert low < curve.floor < high


def test_the_interval_of_a_fit_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    batch = np.geomspace(1_000, 64_000, 10)
    hits = 0
    for _ in range(60):
        cost = 30 * (1 + batch / 20_000) * np.exp(generator.normal(0, 0.05, len(batch)))
        low, high = fit_points(batch, cost).critical_interval
        hits += low <= 20_000 <= high
    assert hits >= 50  # of 60; 57 are expected of 95 %


def test_mlperf_points_held_out_are_predicted_from_the_smallest_and_the_largest():
    batch, epochs = (np.array(list(v), dtype=float) for v in (MLPERF, MLPERF.values()))
    held_out = (batch >= 8192) & (batch <= 49152)
    curve = fit_points(batch[~held_out], epochs[~held_out])
    assert curve.critical == pytest.approx(41_000, rel=0.1)
    assert curve.floor == pytest.approx(32.6, rel=0.06)
    predicted = curve.floor + curve.slope * batch[held_out]
    assert np.abs(predicted / epochs[held_out] - 1).max() < 0.08


def test_each_mlperf_point_is_predicted_by_the_others():
    batch, epochs = (np.array(list(v), dtype=float) for v in (MLPERF, MLPERF.values()))
    assert np.abs(held_out_errors(batch, epochs)).max() < 0.08


def series(generator, steps, correlation=0.0):
    """Noise 800 and signal 2 with relative deviations of 0.3 and 1, correlated in time."""
    draws = np.zeros((steps, 2))
    for i, fresh in enumerate(generator.normal(size=(steps, 2))):
        draws[i] = correlation * draws[i - 1] + math.sqrt(1 - correlation**2) * fresh
    return 800 * (1 + 0.3 * draws[:, 0]), 2 * (1 + draws[:, 1])


@pytest.mark.parametrize(("correlation", "least"), [(0.0, 50), (0.7, 46)])
def test_the_interval_of_a_phase_covers_the_truth_also_where_steps_resemble_each_other(
    correlation, least
):
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(60):
        noise, signal = series(generator, 400, correlation)
        low, high = measure_phase("", np.arange(400), noise, signal, generator).critical_interval
        hits += low <= 400 <= high
    assert hits >= least  # of 60


def test_a_signal_lost_in_noise_has_a_lower_bound_only():
    generator = np.random.default_rng(3)
    signal = generator.normal(0.05, 1, 100)
    noise = np.full(100, 500.0)
    low, high = measure_phase("", np.arange(100), noise, signal, generator).critical_interval
    assert math.isinf(high)
    assert 0 < low < math.inf


def test_the_curve_of_a_run_is_the_sum_of_its_phases_and_passes_through_the_run():
    generator = np.random.default_rng(4)
    steps, criticals, samples, batch = np.arange(50), [100.0, 1000.0, 9000.0], [5e4, 6e4, 7e4], 512
    phases = [
        measure_phase(str(c), steps, np.full(50, c), np.ones(50), generator) for c in criticals
    ]
    curve = curve_of_phases(phases, samples, batch)
    assert curve.cost(batch) == pytest.approx(sum(samples))
    assert curve.cost_interval(batch) == pytest.approx((sum(samples),) * 2)
    for other in (64, 4096):
        parts = zip(criticals, samples, strict=True)
        expected = sum(n * (1 + other / c) / (1 + batch / c) for c, n in parts)
        assert curve.cost(other) == pytest.approx(expected)
    assert min(criticals) < curve.critical < max(criticals)


def test_intervals_keep_their_infinities():
    assert interval(np.array([1.0] * 50 + [math.inf] * 50)) == (1.0, math.inf)
    assert ratio(np.array([1.0, 1.0, -1.0]), np.array([2.0, -1.0, 4.0])).tolist() == [
        0.5,
        math.inf,
        0.0,
    ]
