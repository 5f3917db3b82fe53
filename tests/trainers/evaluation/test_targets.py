"""Scores of numbers and of distributions, against scikit-learn and scipy."""

import math

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from bigbatch.trainers.evaluation.targets import (
    Distributions,
    Numbers,
    distributions_of,
    drawn,
    log_softmax,
    numbers_of,
)


@pytest.fixture
def numbers() -> Numbers:
    rng = np.random.default_rng(0)
    true = rng.normal([3, -200, 0.01], [1, 50, 1e-3], (500, 3))
    return Numbers(true + rng.normal(0, [0.3, 40, 2e-3], (500, 3)), true)


def test_scores_are_scikit_learns(numbers: Numbers) -> None:
    each = numbers.by_target()
    both = numbers.true, numbers.predicted
    raw = {"multioutput": "raw_values"}
    np.testing.assert_allclose(each["mae"], mean_absolute_error(*both, **raw), rtol=1e-12)
    np.testing.assert_allclose(each["rmse"], root_mean_squared_error(*both, **raw), rtol=1e-12)
    np.testing.assert_allclose(each["r2"], r2_score(*both, **raw), rtol=1e-12)
    assert numbers.scores() == {key: pytest.approx(np.mean(each[key])) for key in each}
    assert min(each["r2"]) < 0  # worse than the mean is


def test_a_target_that_does_not_vary_has_no_r2(numbers: Numbers) -> None:
    true = numbers.true.copy()
    true[:, 1] = 0.1
    found = Numbers(numbers.predicted, true)
    each = found.by_target()
    assert math.isnan(each["r2"][1])
    assert found.scores()["r2"] == pytest.approx((each["r2"][0] + each["r2"][2]) / 2)
    assert math.isnan(Numbers(true[:, 1:2] + 1, true[:, 1:2]).scores()["r2"])
    assert all(math.isnan(x) for x in Numbers(true[:0], true[:0]).scores().values())


def test_outputs_mean_what_the_scaling_says() -> None:
    outputs = np.float32([[0, 1], [-1, 0.5]])
    found = numbers_of(outputs, np.float32([[1, 2], [3, 4]]), ([10.0, 100.0], [2.0, 0.1]))
    np.testing.assert_allclose(found.predicted, [[10, 100.1], [8, 100.05]])
    assert found.true.tolist() == [[1, 2], [3, 4]]


def test_distributions_are_scipys() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (200, 5)).astype(np.float32)
    true = softmax(rng.normal(0, 2, (200, 5)), 1).astype(np.float32)
    true[0] = [0, 0, 1, 0, 0]
    found = distributions_of(log_softmax(logits), true)
    p, t = softmax(logits.astype(np.float64), 1), true.astype(np.float64)
    rows = zip(t.tolist(), p.tolist(), strict=True)
    terms = [[a * np.log(a / b) for a, b in zip(*row, strict=True) if a] for row in rows]
    expected = np.array([sum(row) for row in terms])
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-10)
    np.testing.assert_allclose(found.divergence, entropy(t, p, axis=1), atol=1e-6)
    assert found.scores()["mode"] == (p.argmax(1) == t.argmax(1)).mean()
    assert found.scores()["kl"] == pytest.approx(expected.mean())
    sure = distributions_of(log_softmax(np.float32([[1e4, 0]])), np.float32([[1, 0]]))
    assert sure.scores() == {"kl": 0.0, "mode": 1.0}


def test_rows_give_back_what_they_were_made_of(numbers: Numbers) -> None:
    again = Numbers.of_rows(numbers.rows())
    assert np.array_equal(again.true, numbers.true)
    assert np.array_equal(again.predicted, numbers.predicted)
    shares = Distributions(np.array([0.1, 0.2]), np.array([1.0, 0.0]))
    assert Distributions.of_rows(shares.rows()).scores() == shares.scores()


def test_points_of_a_plot_are_few(numbers: Numbers) -> None:
    found = drawn(numbers, 100)
    assert np.array(found["true"]).shape == np.array(found["predicted"]).shape == (100, 3)
    assert found["true"][0] == numbers.true[0].tolist()
    assert found["true"][-1] == numbers.true[-1].tolist()
    assert len(drawn(numbers, 10_000)["true"]) == 500
    assert drawn(Distributions(np.zeros(2), np.ones(2)), 10) == {}
