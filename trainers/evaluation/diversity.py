"""How much the members of an ensemble differ, and what each further one is worth. NumPy only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bigbatch.data.rng import uniforms
from bigbatch.trainers.evaluation.calibration import fit_temperature, tempered
from bigbatch.trainers.evaluation.metrics import Labels, Probabilities, nll
from bigbatch.trainers.evaluation.outcomes import Array, row_chunks
from bigbatch.trainers.evaluation.sums import ExactSum

_SUBSETS = 20  # of each size at most


def disagreement(predicted: NDArray[np.int64]) -> Array:
    """Share of samples on which two members predict different classes, [M, M], of [M, N].

    As Fort et al. 2019 (arXiv:1912.02757) count it: two different wrong answers differ too.
    """
    return np.array([[(a != b).mean() for b in predicted] for a in predicted])


def q_statistic(correct: NDArray[np.bool_]) -> Array:
    """Yule's Q of two members' right answers, [M, M], of [M, N].

    (n11 n00 - n01 n10) / (n11 n00 + n01 n10), where n10 counts the samples that the first gets
    right and the second wrong (Kuncheva and Whitaker 2003): 0 of independent members,
    1 where they fail together, NaN where the denominator is 0.
    """
    right = correct.astype(np.float64)
    wrong = 1 - right
    both = (right @ right.T) * (wrong @ wrong.T)
    one = (right @ wrong.T) * (wrong @ right.T)
    undefined = np.full(both.shape, np.nan)
    return np.divide(both - one, both + one, out=undefined, where=both + one > 0)


def double_fault(correct: NDArray[np.bool_]) -> Array:
    """Share of samples that two members both get wrong, [M, M], of [M, N]."""
    wrong = (~correct).astype(np.float64)
    return wrong @ wrong.T / correct.shape[1]


def subsets(members: int, seed: int = 0) -> list[list[tuple[int, ...]]]:
    """For each number k of members, subsets of that size: all of them, or 20 drawn by the seed.

    All, that is, up to six members. Those drawn are distinct.
    """
    found: list[list[tuple[int, ...]]] = []
    for k in range(1, members + 1):
        if math.comb(members, k) <= _SUBSETS:
            found.append(list(combinations(range(members), k)))
            continue
        drawn: set[tuple[int, ...]] = set()
        attempt = 0
        while len(drawn) < _SUBSETS:
            order = np.argsort(uniforms((members,), seed, "subsets", k, attempt))
            drawn.add(tuple(sorted(order[:k].tolist())))
            attempt += 1
        found.append(sorted(drawn))
    return found


class ByNumber:
    """Accuracy and NLL of the mean probability of 1, 2, ..., M members, over `subsets`.

    Sums over samples are kept: members' probabilities may come in pieces.
    """

    def __init__(self, members: int, seed: int = 0) -> None:
        self._subsets = subsets(members, seed)
        self._hits = [np.zeros(len(s), np.int64) for s in self._subsets]
        self._nll = [ExactSum(len(s)) for s in self._subsets]
        self._samples = np.zeros((), np.int64)

    def add(self, members: NDArray[np.floating], labels: Labels) -> None:
        """Probabilities [M, n, C] of any float type, and labels [n]."""
        self._samples += len(labels)
        for rows in row_chunks(len(labels), members.shape[0] * members.shape[2]):
            p, label = members[:, rows].astype(np.float64, copy=False), labels[rows]
            for of_size, hits, sums in zip(self._subsets, self._hits, self._nll, strict=True):
                losses = np.zeros(len(of_size))
                for i, (first, *others) in enumerate(of_size):
                    # The bits of mean(axis=0), without a copy of the members.
                    mean = sum((p[k] for k in others), start=p[first]) / (1 + len(others))
                    hits[i] += np.count_nonzero(mean.argmax(axis=1) == label)
                    losses[i] = nll(mean, label) * len(label)
                sums.add(losses)

    def sums(self) -> list[NDArray[Any]]:
        """What ranks may add up in place: each has seen other samples."""
        return [self._samples, *self._hits, *(sums.parts for sums in self._nll)]

    def accuracies(self) -> list[Array]:
        """For each number of members, the accuracy of each subset."""
        return [hits / self._samples for hits in self._hits]

    def losses(self) -> list[Array]:
        """For each number of members, the mean NLL of each subset, in nats."""
        return [sums.total / self._samples for sums in self._nll]


def calibrated_nll(
    probabilities: Probabilities, labels: Labels, seed: int = 0, splits: int = 5
) -> float:
    """NLL at the best temperature, which is fitted on one half and applied to the other.

    Both ways, averaged over random halves ("test-time cross-validation", Ashukha et al. 2020,
    arXiv:2002.06470): NLL compares models only so, as it mixes accuracy with a temperature that
    costs nothing to set. Of [N, C]; ValueError below 2 samples.
    """
    if len(labels) < 2:
        raise ValueError("two halves need two samples")
    total = 0.0
    for split in range(splits):
        one, two = halves(len(labels), seed, split)
        for fitted, other in ((one, two), (two, one)):
            temperature = fit_temperature(probabilities[fitted], labels[fitted])
            for rows in row_chunks(len(other), probabilities.shape[1]):
                part = other[rows]
                total += nll(tempered(probabilities[part], temperature), labels[part]) * len(part)
    return total / (splits * len(labels))


def halves(
    samples: int, seed: int = 0, split: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sample numbers of two random halves, each in ascending order, by the seed and `split`."""
    order = np.argsort(uniforms((samples,), seed, "halves", split), kind="stable")
    return np.sort(order[: samples // 2]), np.sort(order[samples // 2 :])


def calibrated_curve(
    members: Sequence[Probabilities], labels: Labels, seed: int = 0
) -> list[float]:
    """`calibrated_nll` of the mean of 1, 2, ..., M members [N, C], each averaged over `subsets`.

    Of members trained from different seeds it is what `deep_ensemble_equivalent` reads. Fits
    ten temperatures for each subset.
    """

    def loss(subset: tuple[int, ...]) -> float:
        return calibrated_nll(np.mean([members[i] for i in subset], axis=0), labels, seed)

    return [float(np.mean([*map(loss, of_size)])) for of_size in subsets(len(members), seed)]


@dataclass(frozen=True)
class Equivalent:
    """A number of independent members. "<=" and ">=" where the curve says no more than a bound."""

    members: float
    relation: Literal["<=", "=", ">="]


def deep_ensemble_equivalent(loss: float, independent: Sequence[float]) -> Equivalent:
    """How many independently trained members reach a calibrated NLL (Ashukha et al. 2020).

    `independent` holds the calibrated NLL (`calibrated_nll`, of the same samples as `loss`) of
    the mean of 1, 2, ... members of other seeds, as `calibrated_curve` gives it. The answer is
    where the line through them first comes down to `loss`: "<= 1" where one member does, ">= K"
    where K, all there are, do not. Raises ValueError where it cannot be said: fewer than two
    points, NaN, or a curve whose later members do not help.
    """
    curve = np.asarray(independent, np.float64)
    if len(curve) < 2 or not np.isfinite([loss, *curve]).all():
        raise ValueError(f"no equivalent of {loss} on {independent}: give two or more numbers")
    if curve[-1] >= curve[0]:
        raise ValueError(f"{len(curve)} independent members are no better than one: {independent}")
    if loss >= curve[0]:
        return Equivalent(1.0, "<=" if loss > curve[0] else "=")
    reached = np.flatnonzero(curve <= loss)
    if not len(reached):
        return Equivalent(float(len(curve)), ">=")
    after = int(reached[0])  # curve[after - 1] > loss >= curve[after]
    share = (curve[after - 1] - loss) / (curve[after - 1] - curve[after])
    return Equivalent(float(after + share), "=")
