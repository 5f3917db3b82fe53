"""What a model says of samples that have targets: errors of numbers, divergences of shares.

NumPy only, in float64, over all samples in their order: the same at any world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bigbatch.configs.judged import KL, MAE, MODE, R2, RMSE

Array = NDArray[np.float64]
_POINTS = 2000  # of a plot of predicted over true numbers
_MOST_DRAWN = 400_000  # numbers that are kept for plots


@dataclass(frozen=True)
class Numbers:
    """Predicted numbers of N samples beside the true ones, both [N, K], in the targets' unit."""

    predicted: Array
    true: Array

    def __len__(self) -> int:
        return len(self.true)

    def scores(self) -> dict[str, float]:
        """Means over the targets; R2 over those that vary, NaN where none does."""
        each = self.by_target()
        r2 = np.array(each[R2.key])
        return {
            MAE.key: float(np.mean(each[MAE.key])),
            RMSE.key: float(np.mean(each[RMSE.key])),
            R2.key: float(r2[~np.isnan(r2)].mean()) if (~np.isnan(r2)).any() else float("nan"),
        }

    def by_target(self) -> dict[str, list[float]]:
        """MAE, RMSE and R2 of each target, [K].

        R2 is 1 less the squared errors over those of the mean of these samples (scikit-learn's
        r2_score); NaN where all have one value.
        """
        if not len(self):
            nothing = [float("nan")] * self.true.shape[1]
            return dict.fromkeys((MAE.key, RMSE.key, R2.key), nothing)
        errors = self.predicted - self.true
        squares = (errors**2).sum(0)
        spread = ((self.true - self.true.mean(0)) ** 2).sum(0)
        varies = self.true.max(0) > self.true.min(0)  # a mean of equal numbers may be none of them
        share = np.divide(squares, spread, out=np.full(len(spread), np.nan), where=varies)
        return {
            MAE.key: np.abs(errors).mean(0).tolist(),
            RMSE.key: np.sqrt(squares / len(errors)).tolist(),
            R2.key: (1 - share).tolist(),
        }

    def rows(self) -> Array:
        """[N, 2K], in which form ranks pass them on."""
        return np.concatenate([self.predicted, self.true], 1)

    @classmethod
    def of_rows(cls, rows: Array) -> Self:
        predicted, true = np.split(rows, 2, axis=1)
        return cls(predicted, true)


@dataclass(frozen=True)
class Distributions:
    """How far predicted shares of classes are from the true ones, for each of N samples, [N]."""

    divergence: Array  # KL(true, predicted), in nats
    mode: Array  # 1 where both have their largest share in the same class, the first of equals

    def __len__(self) -> int:
        return len(self.divergence)

    def scores(self) -> dict[str, float]:
        if not len(self):
            return dict.fromkeys((KL.key, MODE.key), float("nan"))
        return {KL.key: float(self.divergence.mean()), MODE.key: float(self.mode.mean())}

    def by_target(self) -> dict[str, list[float]]:
        return {}

    def rows(self) -> Array:
        return np.stack([self.divergence, self.mode], 1)

    @classmethod
    def of_rows(cls, rows: Array) -> Self:
        return cls(rows[:, 0], rows[:, 1])


TargetOutcomes = Numbers | Distributions


def numbers_of(
    outputs: NDArray[np.floating], true: NDArray[np.floating], scaling: Sequence[Sequence[float]]
) -> Numbers:
    """Outputs [N, K] of a network, in standard deviations of the targets, as what they mean."""
    mean, std = (np.array(x) for x in scaling)
    return Numbers(outputs.astype(np.float64) * std + mean, true.astype(np.float64))


def distributions_of(log_p: Array, true: NDArray[np.floating]) -> Distributions:
    """Outcomes of log-probabilities [N, C] and true shares [N, C]; 0 log 0 is 0."""
    t = true.astype(np.float64)
    there = t > 0
    terms = np.where(there, t * (np.log(np.where(there, t, 1.0)) - log_p), 0.0)
    right = log_p.argmax(1) == t.argmax(1)
    return Distributions(terms.sum(1), right.astype(np.float64))


def mean_distributions_of(
    outputs: NDArray[np.floating], true: NDArray[np.floating]
) -> Distributions:
    """Outcomes of the mean of several networks' shares, from logits [M, N, C]."""
    log_p = np.stack([log_softmax(each) for each in outputs])
    mean: Array = np.logaddexp.reduce(log_p, axis=0) - np.log(len(log_p))
    return distributions_of(mean, true)


def log_softmax(logits: NDArray[np.floating]) -> Array:
    """Row-wise, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def answers(split: str, outputs: Sequence[str], found: TargetOutcomes) -> dict[str, Any]:
    """The content of a targets.json, which the report shows."""
    said = {"split": split, "outputs": list(outputs), "samples": len(found)}
    return said | {"each": found.by_target(), **drawn(found, _POINTS)}


def drawn(found: TargetOutcomes, most: int) -> dict[str, Any]:
    """Points for a plot: predicted and true numbers of at most `most` samples, evenly spaced;
    of fewer where each has many numbers."""
    if not isinstance(found, Numbers) or not len(found):
        return {}
    most = max(10, min(most, _MOST_DRAWN // found.true.shape[1]))
    places = np.unique(np.linspace(0, len(found) - 1, min(most, len(found)), dtype=np.int64))
    return {"true": found.true[places].tolist(), "predicted": found.predicted[places].tolist()}
