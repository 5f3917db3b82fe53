"""Combinations fitted on held-out samples. NumPy, SciPy and scikit-learn."""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.trainers.ensemble.combination import Combination, log_softmax, row_chunks
from bigbatch.trainers.ensemble.held_out import FitData, fold_of
from bigbatch.trainers.evaluation.metrics import Labels, Probabilities

Array = npt.NDArray[np.float64]
TEMPERATURES = (0.01, 100.0)  # between which one is fitted
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C: inverse penalties
_GAP = 1e-7  # nats of NLL between fitted weights and the best ones, at most
_ITERATIONS = 100_000


def fit_weights(data: FitData) -> Combination:
    """Weights on the simplex with the least NLL of the weighted mean probability.

    Convex in the weights. By EM for the proportions of a mixture of known components (Dempster,
    Laird and Rubin 1977, section 4.3), from equal weights: w_m <- w_m g_m, where g_m is the mean
    over samples of p_m / sum_k w_k p_k at the label. The NLL never rises, and max g - 1 bounds its
    distance from the least one (concavity), so that this says when to stop: at 1e-7 nats. Equal
    members get equal weights; the order of members changes no bit.
    """
    logs = label_log_probabilities(require_fit(data))
    p = np.exp(logs - logs.max(axis=0))  # a factor for each sample changes no weight
    order = canonical_order(p)
    p = p[order]
    weights = np.full(len(p), 1 / len(p))
    for _ in range(_ITERATIONS):
        gains = (p / (weights @ p)).mean(axis=1)
        if gains.max() - 1 <= _GAP:
            break
        weights *= gains
        weights /= weights.sum()
    else:
        raise ArithmeticError(f"weights are {gains.max() - 1:.1e} nats from the best ones")
    fitted = np.empty_like(weights)
    fitted[order] = weights
    return Combination("weights", weights=tuple((fitted / math.fsum(fitted)).tolist()))


def fit_temperature(data: FitData, combination: Combination) -> Combination:
    """The combination with the temperature of least NLL, which is convex in 1 / T.

    Fitted on the combined probabilities: members that are calibrated each make a mean that is
    under-confident (Rahaman and Thiery 2021). Within `TEMPERATURES`; the lower one where every
    answer is right.
    """
    plain = replace(combination, temperature=1.0)
    p = plain.apply(require_fit(data).logits)
    return replace(combination, temperature=temperature_of(p, data.labels))


def temperature_of(probabilities: Probabilities, labels: Labels) -> float:
    """T of least mean NLL of p^(1 / T), normalised; probabilities [N, C], labels [N]."""
    from scipy.optimize import brentq

    logs = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    own = logs[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:  # of the NLL by 1 / T: it only rises
        powers = np.exp(inverse * (logs - logs.max(axis=1, keepdims=True)))
        expected = (powers * logs).sum(axis=1) / powers.sum(axis=1)
        return float((expected - own).mean())

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if slope(low) >= 0:
        return 1.0 if slope(high) == 0 else TEMPERATURES[1]  # flat: nothing to mend
    if slope(high) <= 0:
        return TEMPERATURES[0]
    return 1 / brentq(slope, low, high, xtol=1e-12, rtol=1e-12)


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
    features = np.concatenate([log_softmax(data.logits[m]) for m in order], axis=1)
    coefficients, intercepts = _fit_linear(features, data, folds, seed)
    classes = len(intercepts)
    blocks = np.empty((classes, len(order), classes))
    blocks[:, order] = coefficients.reshape(classes, -1, classes)
    return Combination(
        "stack",
        coefficients=tuple(map(tuple, blocks.reshape(classes, -1).tolist())),
        intercepts=tuple(intercepts.tolist()),
    )


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


def _fit_linear(features: Array, data: FitData, folds: int, seed: int) -> tuple[Array, Array]:
    """Coefficients [C, D] and intercepts [C] of the penalty with the least NLL out of fold."""
    classes = data.logits.shape[2]
    counts = np.bincount(data.labels, minlength=classes)
    if counts.min() < 2:
        raise UserError(
            f"class {counts.argmin()} has {counts.min()} samples in {data.split!r}; a linear fit "
            "needs two or more of every class: use a larger split, or another combination"
        )
    fold = fold_of(data, folds, seed)
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
