"""Fits against other optimisers, and what must hold for each."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bigbatch.configs.errors import UserError
from bigbatch.trainers.ensemble.combination import Combination, log_softmax
from bigbatch.trainers.ensemble.fit import (
    STRENGTHS,
    fit_boosted,
    fit_joined,
    fit_rejection,
    fit_stack,
    fit_temperature,
    fit_weights,
    label_log_probabilities,
)
from bigbatch.trainers.ensemble.held_out import FitData, fold_of
from bigbatch.trainers.evaluation import calibration
from bigbatch.trainers.evaluation.metrics import nll, softmax
from tests.trainers.ensemble.held_out_samples import reordered, samples


def loss(weights, data):
    p = np.stack([softmax(m)[np.arange(len(data.labels)), data.labels] for m in data.logits])
    return -np.log(np.asarray(weights) @ p).mean()


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_those_of_another_optimiser(seed):
    data = samples(4, 200, seed=seed)
    found = minimize(
        lambda w: loss(w, data),
        np.full(4, 0.25),
        method="SLSQP",
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-13, "maxiter": 500},
    )
    weights = fit_weights(data).weights
    assert loss(weights, data) <= found.fun + 2e-7
    np.testing.assert_allclose(weights, found.x, atol=2e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 60), st.integers(0, 10**6), st.floats(0.1, 1e3))
def test_weights_are_on_the_simplex_and_no_corner_or_middle_is_better(members, n, seed, scale):
    data = samples(members, n, classes=3, seed=seed)
    data = FitData((scale * data.logits).astype(np.float32), data.labels, data.keys, "val")
    weights = np.array(fit_weights(data).weights)
    assert weights.min() >= 0
    assert abs(weights.sum() - 1) < 1e-12
    logs = label_log_probabilities(data)
    assert np.isfinite(logs).all()
    best = np.logaddexp.reduce(logs + np.log(np.maximum(weights, 1e-300))[:, None]).mean()
    for other in (*np.eye(members), np.full(members, 1 / members)):
        value = np.logaddexp.reduce(logs + np.log(np.maximum(other, 1e-300))[:, None]).mean()
        assert best >= value - 1e-6


def test_weights_of_a_mixture_are_its_proportions():
    """Labels drawn from 0.7 of one member's predictions and 0.3 of another's."""
    generator = np.random.default_rng(0)
    logits = (3 * generator.normal(size=(2, 40_000, 3))).astype(np.float32)
    p = np.tensordot([0.7, 0.3], np.stack([softmax(m) for m in logits]), 1)
    labels = (p.cumsum(axis=1) < generator.random((40_000, 1))).sum(axis=1)
    data = FitData(logits, labels, [str(i) for i in range(40_000)], "val")
    assert fit_weights(data).weights == pytest.approx((0.7, 0.3), abs=0.02)


def test_equal_members_share_a_weight():
    weights = fit_weights(reordered(samples(2), (0, 1, 1, 0, 1))).weights
    assert len(set(weights)) == 2
    alone = fit_weights(samples(2)).weights
    assert sum(weights[1:3]) + weights[4] == pytest.approx(alone[1], abs=2e-3)


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_members_that_are_nearly_alike_get_weights_at_once(distance):
    """Checkpoints of a run's last steps: EM gave up on these after 100,000 steps."""
    generator = np.random.default_rng(0)
    one = 2 * generator.normal(size=(500, 10))
    far = one * 0.5 + generator.normal(size=one.shape)
    near = [one + distance * k * generator.normal(size=one.shape) for k in (1, 2)]
    labels = np.where(np.arange(500) < 100, generator.integers(0, 10, 500), one.argmax(axis=1))
    logits = np.stack([one, *near, far]).astype(np.float32)
    data = FitData(logits, labels, [str(i) for i in range(500)], "val")
    p = np.exp(label_log_probabilities(data))
    weights = np.array(fit_weights(data).weights)
    # Of a concave function this bounds the distance from its maximum.
    assert (p / (weights @ p)).mean(axis=1).max() - 1 < 1.1e-7


def test_one_member_has_all_the_weight():
    assert fit_weights(samples(1)).weights == (1.0,)


def test_the_order_of_members_changes_no_bit_of_a_fit():
    data = samples(3)
    weights, stack = fit_weights(data).weights, fit_stack(data)
    blocks = np.array(stack.coefficients).reshape(4, 3, 4)
    for order in permutations(range(3)):
        again = reordered(data, order)
        assert fit_weights(again).weights == tuple(weights[m] for m in order)
    boosted = fit_boosted(data, folds=2).apply(data.logits)
    again = fit_boosted(reordered(data, (2, 0, 1)), folds=2).apply(data.logits[[2, 0, 1]])
    assert again.tobytes() == boosted.tobytes()
    stacked = fit_stack(reordered(data, (2, 0, 1)))
    assert stacked.intercepts == stack.intercepts
    assert (np.array(stacked.coefficients).reshape(4, 3, 4) == blocks[:, [2, 0, 1]]).all()


@pytest.mark.parametrize("method", ["mean", "logits", "vote"])
def test_temperature_is_that_of_another_optimiser(method):
    data, whole = samples(n=300), Combination(method)
    p = whole.apply(data.logits)
    found = minimize_scalar(
        lambda log: nll(calibration.tempered(p, np.exp(log)), data.labels),
        bounds=np.log(calibration.TEMPERATURES),
        method="bounded",
        options={"xatol": 1e-9},
    )
    fitted = fit_temperature(data, whole)
    assert fitted.method == method
    assert fitted.temperature == pytest.approx(np.exp(found.x), rel=1e-5)
    # It is fitted on what was combined, so one that is there already does not count.
    assert fit_temperature(data, fitted) == fitted


@pytest.mark.parametrize("coverage", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_rejection_keeps_the_coverage_that_was_asked_for(coverage):
    data = samples(n=200)
    whole = fit_rejection(data, Combination(), coverage)
    accepted = whole.accepted(whole.apply(data.logits))
    assert accepted.sum() == 200 * coverage  # no two confidences are equal here
    with pytest.raises(UserError, match=r"coverage = 1\.5"):
        fit_rejection(data, Combination(), 1.5)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_stack_is_scikit_learns(classes):
    """Penalty and probabilities: its grid search over our folds, on standardised inputs."""
    data = samples(3, 100, classes=classes)
    features = np.concatenate([log_softmax(m) for m in data.logits], axis=1)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(tol=1e-6, max_iter=10_000)),
        {"logisticregression__C": STRENGTHS},
        scoring="neg_log_loss",
        cv=PredefinedSplit(fold_of(data, 5, seed=0)),
    ).fit(features, data.labels)
    p = fit_stack(data).apply(data.logits)
    np.testing.assert_allclose(p, search.predict_proba(features), atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_boosted_trees_are_scikit_learns(classes):
    """Its probabilities, and no other number of rounds that was tried is better out of fold."""
    data = samples(3, 90, classes=classes)
    features = np.concatenate([log_softmax(m) for m in data.logits], axis=1)
    whole = fit_boosted(data, folds=3)
    rounds = len(whole.trees.roots) // (1 if classes == 2 else classes)

    def scikit(rounds):
        return HistGradientBoostingClassifier(
            learning_rate=0.1, max_iter=rounds, max_leaf_nodes=8, early_stopping=False
        )

    def out_of_fold(rounds):
        cv = PredefinedSplit(fold_of(data, 3, seed=0))
        args = (scikit(rounds), features, data.labels)
        return cross_val_score(*args, scoring="neg_log_loss", cv=cv).mean()

    # Columns come in another order, so that equal splits may be made by another one of them.
    order = sorted(range(3), key=lambda m: data.logits[m].tobytes())
    columns = np.concatenate([np.arange(classes) + m * classes for m in order])
    fitted = scikit(rounds).fit(features[:, columns], data.labels)
    p = whole.apply(data.logits)
    np.testing.assert_allclose(p, fitted.predict_proba(features[:, columns]), atol=1e-12)
    others = {1, rounds - 1, rounds + 1, 2 * rounds} - {0, rounds}
    assert out_of_fold(rounds) >= max(map(out_of_fold, others)) - 1e-9


def test_a_stack_wants_two_samples_of_every_class():
    data = samples(n=40)
    rest = data.rows((data.labels != 2) | (np.arange(40) == np.argmax(data.labels == 2)))
    with pytest.raises(UserError, match="there are 1 samples of class 2 in 'val' to fit"):
        fit_stack(rest)


def test_a_constant_feature_does_nothing():
    data = samples(n=60)
    features = np.concatenate([data.logits[0], np.full((60, 1), 0.1)], axis=1)
    coefficients, intercepts = fit_joined(features, data)
    assert (coefficients[:, -1] == 0).all()
    plain, _ = fit_joined(data.logits[0], data)
    np.testing.assert_allclose(coefficients[:, :-1], plain, rtol=1e-9)
    assert intercepts.shape == (4,)


def test_joined_features_make_a_linear_layer_that_beats_either_alone():
    """Two members that each see one half of what tells the classes apart."""
    generator = np.random.default_rng(0)
    labels = np.arange(400) % 4
    first = np.where(labels[:, None] < 2, 3.0, -3.0) + generator.normal(size=(400, 2))
    second = np.where(labels[:, None] % 2, 40.0, -40.0) + 9 * generator.normal(size=(400, 3))
    data = samples(n=400)
    data = FitData(data.logits, labels, data.keys, "val")

    def accuracy(features):
        coefficients, intercepts = fit_joined(features, data)
        layer = torch.nn.Linear(features.shape[1], 4)
        layer.weight.data = torch.tensor(coefficients, dtype=torch.float32)
        layer.bias.data = torch.tensor(intercepts, dtype=torch.float32)
        outputs = layer(torch.tensor(features, dtype=torch.float32))
        return float((outputs.argmax(1).numpy() == labels).mean())

    assert accuracy(np.concatenate([first, second], axis=1)) > 0.98
    assert accuracy(first) < 0.6
    assert accuracy(second) < 0.6
    with pytest.raises(ValueError, match=r"shape \(399, 2\) for 400 samples"):
        fit_joined(first[:-1], data)
