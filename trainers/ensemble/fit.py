"""Combinations fitted on held-out samples. NumPy and scikit-learn."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.trainers.ensemble.combination import (
    Combination,
    joined_log_probabilities,
    log_softmax,
)
from bigbatch.trainers.ensemble.held_out import FitData, fold_of
from bigbatch.trainers.ensemble.trees import Trees
from bigbatch.trainers.evaluation import calibration
from bigbatch.trainers.evaluation.metrics import Labels, nll, softmax
from bigbatch.trainers.evaluation.outcomes import row_chunks

Array = npt.NDArray[np.float64]
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C: inverse penalties
_GAP = 1e-7  # nats of NLL between fitted weights and the best ones, at most
_ITERATIONS = 10_000
_ROUNDS = 100  # of boosting, at most


def fit_weights(data: FitData) -> Combination:
    """Weights on the simplex with the least NLL of the weighted mean probability.

    Convex in the weights. With g_m the mean over samples of p_m / sum_k w_k p_k at the label,
    max g - 1 bounds the distance from the least NLL (concavity), so that this says when to stop:
    at 1e-7 nats. By Newton's method on NLL + sum(w) - mu sum(log w), mu falling to 0: sum(w)
    stands for the constraint (Kim et al. 2020), and steps are damped so that no weight falls
    below 0 (Boyd and Vandenberghe 2004, sections 9.6 and 11.3). EM takes millions of steps where
    members are nearly alike. Equal members get equal weights; the order of members changes no bit.
    """
    logs = label_log_probabilities(require_fit(data))
    # A factor for each sample changes no weight; members that say the same are one.
    p, place, times = np.unique(
        np.exp(logs - logs.max(axis=0)), axis=0, return_inverse=True, return_counts=True
    )
    samples, mu = p.shape[1], 1.0
    weights = np.full(len(p), 1 / len(p))
    for _ in range(_ITERATIONS):
        ratios = p / (weights @ p)
        gains = ratios.mean(axis=1)
        if gains.max() * weights.sum() - 1 <= _GAP:
            break
        slope = samples * (1 - gains) - mu / weights
        step = -np.linalg.solve(ratios @ ratios.T + np.diag(mu / weights**2), slope)
        decrement = math.sqrt(max(0.0, -(slope @ step) / mu))
        weights += step / (1 + decrement)
        if decrement < 0.5:
            mu /= 8
    else:
        raise ArithmeticError(f"weights are {gains.max() - 1:.1e} nats from the best ones")
    fitted = (weights / times)[place.reshape(-1)]
    return Combination("weights", weights=tuple((fitted / math.fsum(fitted)).tolist()))


def fit_temperature(data: FitData, combination: Combination) -> Combination:
    """The combination with the temperature of least NLL, which is convex in 1 / T.

    Fitted on the combined probabilities: members that are calibrated each make a mean that is
    under-confident (Rahaman and Thiery 2021).
    """
    plain = replace(combination, temperature=1.0)
    p = plain.apply(require_fit(data).logits)
    return replace(combination, temperature=calibration.fit_temperature(p, data.labels))


def fit_rejection(data: FitData, combination: Combination, coverage: float) -> Combination:
    """The combination with the highest threshold that accepts a share of at least `coverage`."""
    if not 0 < coverage <= 1:
        raise UserError(f"coverage = {coverage}; it is a share of the samples, above 0, at most 1")
    confidence = np.sort(combination.apply(require_fit(data).logits).max(axis=1))[::-1]
    last = max(1, math.ceil(coverage * len(confidence) - 1e-9)) - 1
    return replace(combination, reject_below=float(confidence[last]))


def fit_stack(data: FitData, folds: int = 5, seed: int = 0) -> Combination:
    """Multinomial logistic regression on the members' log-probabilities (Wolpert 1992).

    The L2 penalty is the one of `STRENGTHS` with the least NLL out of fold; folds go by sample
    key. Raises UserError where a class has fewer than two samples.
    """
    order = canonical_order(require_fit(data).logits)
    features = joined_log_probabilities(data.logits[order])
    coefficients, intercepts = _fit_linear(features, data, folds, seed)
    classes = len(intercepts)
    blocks = np.empty((classes, len(order), classes))
    blocks[:, order] = coefficients.reshape(classes, -1, classes)
    return Combination(
        "stack",
        coefficients=tuple(map(tuple, blocks.reshape(classes, -1).tolist())),
        intercepts=tuple(intercepts.tolist()),
    )


def fit_boosted(data: FitData, folds: int = 5, seed: int = 0) -> Combination:
    """Gradient-boosted trees on the members' log-probabilities: scikit-learn's, kept as numbers.

    Trees of 8 leaves at most and rate 0.1 (Friedman 2001); of 1 to 100 rounds the number with the
    least NLL out of fold. For few classes: a round grows a tree for each. Raises UserError where a
    class has fewer than two samples.
    """
    order = canonical_order(require_fit(data).logits)
    features = joined_log_probabilities(data.logits[order])
    fold, losses = _usable_folds(data, folds, seed), np.zeros(_ROUNDS)
    for number in range(folds):
        inside = fold != number
        y = data.labels[~inside]
        model = _boosted(features[inside], data.labels[inside], _ROUNDS)
        for done, p in enumerate(model.staged_predict_proba(features[~inside])):
            losses[done] += nll(p, y) * len(y)
    model = _boosted(features, data.labels, int(losses.argmin()) + 1)
    trees = _plain(model, features.shape[1])
    # The form of its trees is scikit-learn's own affair: what was read is what it computes, or no.
    if not np.allclose(softmax(trees.scores(features)), model.predict_proba(features), 0, 1e-9):
        raise RuntimeError("this scikit-learn keeps its trees in another form than 1.9 does")
    classes = data.logits.shape[2]
    place = np.repeat(np.array(order) * classes, classes) + np.tile(np.arange(classes), len(order))
    moved = [-1 if f < 0 else int(place[f]) for f in trees.feature]
    return Combination("boost", trees=replace(trees, feature=tuple(moved)))


def fit_joined(
    features: npt.NDArray[np.floating], data: FitData, folds: int = 5, seed: int = 0
) -> tuple[Array, Array]:
    """A linear head on the joined features of all members, [N, D] in the order of `data`.

    Returns coefficients [C, D] and intercepts [C] in float64, such as `torch.nn.Linear` takes:
    features are standardised in the fit, and that is folded into both. The penalty is chosen as in
    `fit_stack`. Raises UserError where a class has fewer than two samples.
    """
    if features.ndim != 2 or len(features) != len(require_fit(data).keys):
        raise ValueError(f"features of shape {features.shape} for {len(data.keys)} samples")
    return _fit_linear(features.astype(np.float64), data, folds, seed)


def require_fit(data: FitData) -> FitData:
    """The data; TypeError where these are not for fitting, whatever a caller's types say."""
    if not isinstance(data, FitData):
        raise TypeError(f"a fit takes FitData, not {type(data).__name__}")
    if not len(data.keys):
        raise UserError(f"the split {data.split!r} has no sample to fit on")
    return data


def canonical_order(members: npt.NDArray[np.floating]) -> list[int]:
    """Members sorted by what they say: fits that go by it do not depend on the order given."""
    return sorted(range(len(members)), key=lambda m: members[m].tobytes())


def label_log_probabilities(data: FitData) -> Array:
    """Each member's log-probability of the label; [M, N]."""
    members, samples, classes = data.logits.shape
    logs = np.empty((members, samples))
    for rows in row_chunks(samples, classes):
        labels = data.labels[rows]
        for m in range(members):
            logs[m, rows] = log_softmax(data.logits[m, rows])[np.arange(len(labels)), labels]
    return logs


def _usable_folds(data: FitData, folds: int, seed: int) -> Labels:
    """Folds of which each leaves samples of every class; UserError where there cannot be any."""
    counts = np.bincount(data.labels, minlength=data.logits.shape[2])
    if counts.min() < 2:
        raise UserError(
            f"there are {counts.min()} samples of class {counts.argmin()} in {data.split!r} to fit "
            "on (less a fold, for figures out of fold); a stack, trees or a head need two or more "
            "of every class: use a larger split, or another combination"
        )
    return fold_of(data, folds, seed)


def _fit_linear(features: Array, data: FitData, folds: int, seed: int) -> tuple[Array, Array]:
    """Coefficients [C, D] and intercepts [C] of the penalty with the least NLL out of fold."""
    fold = _usable_folds(data, folds, seed)
    losses = np.zeros(len(STRENGTHS))
    for number in range(folds):
        inside = fold != number
        x, y = features[~inside], data.labels[~inside]
        for which, strength in enumerate(STRENGTHS):
            a, b = _logistic(features[inside], data.labels[inside], strength)
            losses[which] -= log_softmax(x @ a.T + b)[np.arange(len(y)), y].sum()
    return _logistic(features, data.labels, STRENGTHS[int(losses.argmin())])


def _logistic(features: Array, labels: Labels, strength: float) -> tuple[Array, Array]:
    """scikit-learn's logistic regression on standardised features, for features as they are."""
    from sklearn.linear_model import LogisticRegression

    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation[deviation <= 1e-12 * np.abs(mean)] = np.inf  # constant: without effect
    model = LogisticRegression(C=strength, tol=1e-6, max_iter=10_000)
    model.fit((features - mean) / deviation, labels)
    a, b = model.coef_, model.intercept_
    if len(a) == 1:  # two classes: one row, the log-odds of the second
        a, b = np.concatenate([0 * a, a]), np.array([0.0, b[0]])
    a = a / deviation
    return a, b - a @ mean


def _boosted(features: Array, labels: Labels, rounds: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(
        learning_rate=0.1, max_iter=rounds, max_leaf_nodes=8, early_stopping=False, random_state=0
    )
    return model.fit(features, labels)


def _plain(model: Any, features: int) -> Trees:
    """scikit-learn's trees, one after another. Those of two classes score the second alone."""
    baseline = model._baseline_prediction[0]
    second = int(len(baseline) == 1)
    trees = [(t.nodes, c + second) for rnd in model._predictors for c, t in enumerate(rnd)]
    roots = np.cumsum([0, *(len(nodes) for nodes, _ in trees)])[:-1]
    nodes = np.concatenate([nodes for nodes, _ in trees])
    shift = np.repeat(roots, [len(nodes) for nodes, _ in trees])
    leaf = nodes["is_leaf"] == 1
    return Trees(
        features,
        tuple(np.concatenate([np.zeros(second), baseline]).tolist()),
        tuple(roots.tolist()),
        tuple(output for _, output in trees),
        tuple(np.where(leaf, -1, nodes["feature_idx"]).tolist()),
        tuple(np.where(leaf, nodes["value"], nodes["num_threshold"]).tolist()),
        tuple(np.where(leaf, 0, nodes["left"] + shift).tolist()),
        tuple(np.where(leaf, 0, nodes["right"] + shift).tolist()),
    )
