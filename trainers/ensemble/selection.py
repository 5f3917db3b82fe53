"""Which members take part, decided on held-out samples, and what that decision is worth."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.configs.judged import ACCURACY
from bigbatch.configs.judged import Score as Judge
from bigbatch.data.rng import uniforms
from bigbatch.trainers.ensemble.combination import Combination, Logits
from bigbatch.trainers.ensemble.fit import (
    Array,
    canonical_order,
    fit_boosted,
    fit_rejection,
    fit_stack,
    fit_temperature,
    fit_weights,
    label_log_probabilities,
    require_fit,
)
from bigbatch.trainers.ensemble.held_out import FitData, fold_of
from bigbatch.trainers.evaluation.metrics import Probabilities, softmax

Score = Literal["nll", "accuracy"]


def within_margin(scores: list[float], margin: float, judge: Judge = ACCURACY) -> list[int]:
    """Members whose validation score is within `margin` of the best one's.

    Of an error, which has a unit, `margin` is a share of the best one's.
    """
    if not judge.more_is_better:
        most = min((s for s in scores if math.isfinite(s)), default=math.inf) * (1 + margin)
        return [i for i, score in enumerate(scores) if score <= most] or [0]
    best = max(scores)
    return [i for i, score in enumerate(scores) if score >= best - margin]


def gate(data: FitData, margin: float) -> tuple[int, ...]:
    """Members whose accuracy is within `margin` of the best one's; all at a margin of 1."""
    right = [(member.argmax(axis=1) == data.labels) for member in require_fit(data).logits]
    return tuple(within_margin([float(r.mean()) for r in right], margin))


def select_greedily(
    data: FitData,
    *,
    score: Score = "nll",
    rounds: int = 50,
    bags: int = 1,
    fraction: float = 0.5,
    seed: int = 0,
) -> Combination:
    """Weights from greedy forward selection with replacement (Caruana et al. 2004).

    From the best prefix of the members sorted by their own score (their section 2.2), the member
    that improves the score of the mean probability most is added, and may be added again, until
    `rounds` are in; the best ensemble on the way is taken, the smallest among equals. With two
    `bags` or more each sees a share of `fraction` of the members, drawn by `seed`, and all counts
    are added up (their section 2.3): for large libraries and small splits, where lucky
    combinations are found. One bag sees all members.

    `accuracy` holds all probabilities [M, N, C] in float64; `nll` those of the labels. Equal
    scores go to the member that comes first when they are sorted by what they say, so the order in
    which they are given changes no bit.
    """
    if rounds < 1 or bags < 1 or not 0 < fraction <= 1:
        raise UserError(f"rounds = {rounds}, bags = {bags}, fraction = {fraction}; there must be "
                        "1 or more rounds and bags, of a share in (0, 1]")  # fmt: skip
    order = canonical_order(require_fit(data).logits)
    if score == "nll":
        own = np.exp(label_log_probabilities(data))[order]
    else:
        own = np.stack([softmax(data.logits[m]) for m in order])
    labels = data.labels

    def worth(p: Array) -> float:
        if score == "nll":
            return float(np.log(np.maximum(p, np.finfo(np.float64).tiny)).mean())
        return float((p.argmax(axis=1) == labels).mean())

    size = len(order) if bags == 1 else math.ceil(len(order) * fraction)
    counts = np.zeros(len(order), np.int64)
    for bag in range(bags):
        chosen = np.sort(np.argsort(uniforms((len(order),), "bag", seed, bag))[:size])
        counts[chosen] += _greedy(own[chosen], worth, rounds)
    weights = np.empty(len(order))
    weights[order] = counts / counts.sum()
    return Combination("weights", weights=tuple(weights.tolist()))


def _greedy(own: Array, worth: Callable[[Array], float], rounds: int) -> npt.NDArray[np.int64]:
    """How often each member of [M, ...] is in the best ensemble on the greedy way."""
    members = range(len(own))
    alone = [worth(own[m]) for m in members]
    ranked = sorted(members, key=lambda m: (-alone[m], m))
    path, totals, best = [], np.zeros_like(own[0]), -np.inf
    for size in range(1, len(own) + 1):  # sorted initialisation: the best of all prefixes
        totals = totals + own[ranked[size - 1]]
        if (value := worth(totals / size)) > best:
            best, path = value, ranked[:size]
    totals, chosen = own[path].sum(axis=0), list(path)
    while len(chosen) < rounds:
        values = [worth((totals + own[m]) / (len(chosen) + 1)) for m in members]
        member = int(np.argmax(values))
        chosen.append(member)
        totals = totals + own[member]
        if values[member] > best:
            best, path = values[member], list(chosen)
    return np.bincount(path, minlength=len(own))


@dataclass(frozen=True)
class Fitted:
    """The members that take part, by number, and how they are combined."""

    members: tuple[int, ...]
    combination: Combination

    def apply(self, logits: Logits) -> Probabilities:
        """Probabilities [N, C] from the logits [M, N, C] of all members."""
        return self.combination.apply(logits[list(self.members)])


@dataclass(frozen=True)
class CrossFitted:
    """A fit on all samples, and estimates of what it is worth that no sample made itself."""

    fitted: Fitted  # on all samples: what is used from here on
    probabilities: Probabilities  # [N, C], out of fold: what is reported of these samples
    accepted: npt.NDArray[np.bool_]  # [N], out of fold
    by_fold: tuple[Fitted, ...]


def cross_fit(
    data: FitData, fit: Callable[[FitData], Fitted], folds: int = 5, seed: int = 0
) -> CrossFitted:
    """Fit on all samples; estimate each sample by a fit on the folds that it is not in.

    For whatever gate, weights and temperature `fit` makes of one split (Stone 1974; "cross-fitting"
    of Chernozhukov et al. 2018). Folds go by sample key. The estimates are those of fits on
    1 - 1 / folds of the samples, so they are on the pessimistic side.
    """
    fold = fold_of(require_fit(data), folds, seed)
    probabilities = np.empty(data.logits.shape[1:])
    accepted = np.empty(len(fold), bool)
    by_fold = []
    for number in range(folds):
        outside = fold == number
        fitted = fit(data.rows(~outside))
        p = fitted.apply(data.logits[:, outside])
        probabilities[outside], accepted[outside] = p, fitted.combination.accepted(p)
        by_fold.append(fitted)
    return CrossFitted(fit(data), probabilities, accepted, tuple(by_fold))


def fit_ensemble(
    data: FitData,
    method: str = "mean",
    *,
    margin: float = 1.0,
    temperature: bool = True,
    coverage: float | None = None,
    seed: int = 0,
) -> Fitted:
    """All of it in order: gate, combination, temperature, rejection threshold.

    `method` is one of a combination's, or `greedy` for weights by selection. Members that a fit
    gives no weight at all are left out.
    """
    members = gate(data, margin)
    data = data.of_members(members)
    match method:
        case "weights":
            combination = fit_weights(data)
        case "greedy":
            combination = select_greedily(data, seed=seed)
        case "stack":
            combination = fit_stack(data, seed=seed)
        case "boost":
            combination = fit_boosted(data, seed=seed)
        case _:
            combination = Combination(method)  # type: ignore[arg-type]  # it checks its method
    if combination.weights is not None and 0.0 in combination.weights:
        used = [i for i, weight in enumerate(combination.weights) if weight > 0]
        members, data = tuple(members[i] for i in used), data.of_members(used)
        weights = tuple(combination.weights[i] for i in used)
        combination = replace(combination, weights=weights)
    if temperature:
        combination = fit_temperature(data, combination)
    if coverage is not None:
        combination = fit_rejection(data, combination, coverage)
    return Fitted(members, combination)
