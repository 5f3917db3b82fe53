"""Calibration against scikit-learn, scipy and brute force."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator

from bigbatch.trainers.evaluation import calibration
from bigbatch.trainers.evaluation import outcomes as module
from bigbatch.trainers.evaluation.calibration import (
    TEMPERATURES,
    ClasswiseError,
    fit_temperature,
    reliability,
    tempered,
)
from bigbatch.trainers.evaluation.metrics import calibration_error, nll, softmax
from tests.helpers.predictions import predictions, small_predictions


def confidence_of(p, labels):
    return p.max(axis=1), p.argmax(axis=1) == labels


@given(small_predictions())
def test_equal_width_is_the_calibration_error(drawn):
    (p,), labels = drawn
    assert reliability(*confidence_of(p, labels)).error == pytest.approx(
        calibration_error(p, labels), abs=1e-12
    )


@pytest.mark.parametrize(("equal_mass", "strategy"), [(False, "uniform"), (True, "quantile")])
def test_bins_against_scikit_learn(equal_mass, strategy):
    (p,), labels = predictions(150, 4, members=1)
    confidence, correct = confidence_of(p, labels)
    table = reliability(confidence, correct, equal_mass=equal_mass)
    wanted = calibration_curve(correct, confidence, n_bins=15, strategy=strategy)
    filled = table.count > 0
    assert table.accuracy[filled] == pytest.approx(wanted[0])
    assert table.confidence[filled] == pytest.approx(wanted[1])
    if equal_mass:
        assert (table.count == 10).all()


@given(small_predictions(), st.randoms())
def test_equal_mass_does_not_know_the_order_of_samples(drawn, random):
    (p,), labels = drawn
    confidence, correct = confidence_of(p, labels)
    order = list(range(len(p)))
    random.shuffle(order)
    shuffled = reliability(confidence[order], correct[order], 3, equal_mass=True)
    wanted = reliability(confidence, correct, 3, equal_mass=True)
    assert (shuffled.count == wanted.count).all()
    assert shuffled.error == pytest.approx(wanted.error)


def test_equal_confidences_share_a_bin():
    table = reliability(np.full(30, 0.7), np.arange(30) < 15, equal_mass=True)
    assert table.count.tolist() == [30] + [0] * 14
    assert table.error == pytest.approx(0.2)


@given(small_predictions())
def test_classwise_error_by_brute_force(drawn):
    (p,), labels = drawn
    error = ClasswiseError(p.shape[1], bins=4)
    error.add(p[:1], labels[:1])
    error.add(p[1:], labels[1:])
    total = 0.0
    for c in range(p.shape[1]):
        for k in range(4):
            inside = (p[:, c] > k / 4) & (p[:, c] <= (k + 1) / 4) | ((p[:, c] == 0) & (k == 0))
            if inside.any():
                gap = (labels[inside] == c).mean() - p[inside, c].mean()
                total += abs(gap) * inside.sum() / len(p)
    assert error.error == pytest.approx(total / p.shape[1], abs=1e-12)


def test_classwise_error_of_many_classes_takes_what_occurs():
    """Sums of 15 bins of each of 100,000 classes were 24 MB a model."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 20_000, 60)
    p = softmax(3 * generator.normal(size=(60, 20_000)))
    p[np.arange(0, 60, 2), labels[::2]] += 1.5
    p /= p.sum(axis=1, keepdims=True)
    tracemalloc.start()
    parts = []
    for rows in (slice(0, 60), slice(0, 13), slice(13, 60)):
        parts.append(ClasswiseError(20_000))
        for row in range(*rows.indices(60)):
            parts[-1].add(p[row : row + 1], labels[row : row + 1])
    kept = tracemalloc.get_traced_memory()[0] / len(parts)
    tracemalloc.stop()
    assert kept < 0.5 * 2 * 15 * 20_000 * 8
    gaps = np.zeros((20_000, 15))
    bins = np.clip(np.ceil(p * 15).astype(int) - 1, 0, 14)
    right = np.arange(20_000) == labels[:, None]
    for row in range(60):
        gaps[np.arange(20_000), bins[row]] += right[row] - p[row]
    whole, one, two = parts
    assert whole.error == pytest.approx(np.abs(gaps).sum() / 60 / 20_000, abs=1e-12)
    # Ranks add up what is dense, and send what is not: the same bits as of one rank.
    for mine, other in zip(one.sums(), two.sums(), strict=True):
        mine += other
    one.above.put([one.above.rows(), two.above.rows()])
    assert one.error == whole.error


def test_tempered_divides_logits():
    logits = np.random.default_rng(0).normal(size=(20, 5)) * 30
    for temperature in (0.3, 1.0, 4.0):
        wanted = softmax(logits / temperature)
        assert tempered(softmax(logits), temperature) == pytest.approx(wanted, abs=1e-14)


def test_tempered_zeros_and_certainties_stay():
    p = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 - 1e-300, 1e-300, 0.0]])
    for temperature in TEMPERATURES:
        result = tempered(p, temperature)
        assert (result[:2] == p[:2]).all()
        assert result.sum(axis=1) == pytest.approx(1)
    with pytest.raises(ValueError, match="above 0"):
        tempered(p, 0.0)


class Logits(ClassifierMixin, BaseEstimator):
    """A classifier whose inputs are its logits."""

    def fit(self, x, y):
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, x):
        return x

    def predict(self, x):
        return x.argmax(axis=1)


def test_temperature_against_scikit_learn_and_scipy():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 6, 500)
    logits = 3 * (generator.normal(size=(500, 6)) + 2 * np.eye(6)[labels])
    found = fit_temperature(softmax(logits), labels)
    peer = CalibratedClassifierCV(
        FrozenEstimator(Logits().fit(logits, labels)), method="temperature"
    ).fit(logits, labels)
    (inside,) = peer.calibrated_classifiers_[0].calibrators
    assert found == pytest.approx(1 / inside.beta_, rel=1e-5)

    def loss(inverse):
        return -log_softmax(inverse * logits, axis=1)[np.arange(500), labels].mean()

    wanted = minimize_scalar(loss, bounds=(0.01, 10), options={"xatol": 1e-10})
    assert 1 / found == pytest.approx(wanted.x, rel=1e-6)


@pytest.mark.parametrize("factor", [0.1, 0.7, 1.0, 5.0])
def test_a_known_temperature_comes_back(factor, monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS", 1000)
    generator = np.random.default_rng(0)
    truth = softmax(generator.normal(size=(20_000, 4)))
    labels = (generator.random((20_000, 1)) > truth.cumsum(axis=1)).sum(axis=1)
    labels = labels.clip(max=3)
    found = fit_temperature(tempered(truth, 1 / factor), labels)
    assert found == pytest.approx(factor, rel=0.05)


@given(st.floats(0.2, 5.0))
def test_temperature_of_a_power_is_that_much_lower(exponent):
    (p,), labels = predictions(100, 4, members=1)
    sharp = p**exponent / (p**exponent).sum(axis=1, keepdims=True)
    expected = exponent * fit_temperature(p, labels)
    assert fit_temperature(sharp, labels) == pytest.approx(expected, rel=1e-8)


@given(small_predictions())
def test_no_other_temperature_is_better(drawn):
    (p,), labels = drawn
    found = fit_temperature(p, labels)
    chosen = p[np.arange(len(labels)), labels]
    assume(((chosen > 0) & (chosen < p.max(axis=1))).any())  # all right is left alone
    assert TEMPERATURES[0] <= found <= TEMPERATURES[1]
    best = nll(tempered(p, found), labels)
    for factor in (0.5, 0.99, 1.01, 2.0):
        other = min(max(found * factor, TEMPERATURES[0]), TEMPERATURES[1])
        assert best <= nll(tempered(p, other), labels) + 1e-9


def test_a_fit_takes_few_passes(monkeypatch):
    passes = []
    slopes = calibration._slopes
    monkeypatch.setattr(calibration, "_slopes", lambda *a: passes.append(1) or slopes(*a))
    generator = np.random.default_rng(0)
    for _ in range(100):
        scale = 10 ** generator.uniform(-3, 3, size=(30, 1))
        logits = scale * generator.normal(size=(30, 4))
        labels = np.where(generator.random(30) < 0.7, logits.argmax(axis=1), 0)
        passes.clear()
        fit_temperature(softmax(logits), labels)
        assert len(passes) <= 20


@given(small_predictions(), st.randoms())
def test_the_order_of_classes_changes_no_temperature(drawn, random):
    (p,), labels = drawn
    new = list(range(p.shape[1]))
    random.shuffle(new)
    moved = np.empty_like(p)
    moved[:, new] = p
    found = fit_temperature(moved, np.array(new)[labels])
    assert found == pytest.approx(fit_temperature(p, labels))


@pytest.mark.parametrize(
    ("p", "labels", "wanted"),
    [
        ([[0.9, 0.1], [0.3, 0.7]], [0, 1], 1.0),  # all right: nothing says how sure to be
        ([[0.9, 0.1], [0.3, 0.7]], [1, 0], TEMPERATURES[1]),  # all wrong: flatter is better
        ([[1.0], [1.0]], [0, 0], 1.0),  # a single class
        ([[0.25] * 4] * 3, [0, 1, 2], 1.0),  # nothing to change
        ([[1.0, 0.0], [1.0, 0.0]], [0, 1], 1.0),  # certain: the mistake costs the same at any
        ([[1 - 1e-17, 1e-17]], [1], TEMPERATURES[1]),
    ],
)
def test_temperatures_at_the_ends(p, labels, wanted):
    assert fit_temperature(np.array(p), np.array(labels)) == wanted


def test_nearly_certain_mistakes_are_not_rounded_away():
    # As probabilities 1e-30 beside 1 is nothing; their logarithms, 69 apart, tell T exactly:
    # of 10 samples 1 is wrong, so that the tempered confidence must be 0.9.
    p = np.tile([1.0, 1e-30], (10, 1))
    found = fit_temperature(p, np.array([1] + [0] * 9))
    assert found == pytest.approx(np.log(1e30) / np.log(9), rel=1e-9)


def test_many_classes():
    (p,), labels = predictions(40, 20_000, members=1)
    found = fit_temperature(p, labels)
    assert nll(tempered(p, found), labels) <= nll(p, labels)


@pytest.mark.parametrize("p", [np.empty((0, 2)), np.array([[np.nan, 0.5]])])
def test_no_temperature_without_numbers(p):
    with pytest.raises(ValueError, match="samples, and probabilities"):
        fit_temperature(p, np.zeros(len(p), np.int64))
