"""Answering only where the model is confident: risk against coverage. NumPy only."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigbatch.trainers.evaluation.outcomes import Array


@dataclass(frozen=True)
class RiskCoverage:
    """The errors among the most confident answers, at every number of answers.

    Samples of equal confidence cannot be told apart by a threshold. Between two thresholds
    figures are therefore those of a random order of the equals, in expectation: the order in
    which samples came never counts.
    """

    thresholds: Array  # [K] distinct confidences, falling; answers are those of at least it
    answered: NDArray[np.int64]  # [K] samples of at least that confidence
    errors: NDArray[np.int64]  # [K] wrong ones among them

    @property
    def samples(self) -> int:
        return int(self.answered[-1])

    @property
    def coverage(self) -> Array:
        """Share of samples that are answered [K]."""
        return self.answered / self.samples

    @property
    def risk(self) -> Array:
        """Share of the answers that are wrong [K]."""
        return self.errors / self.answered

    @property
    def aurc(self) -> float:
        """Area under the curve: the risk of the i most confident, averaged over i = 1 ... N.

        Geifman, Uziel and El-Yaniv 2019 (arXiv:1805.08206).
        """
        numbers = np.arange(1, self.samples + 1)
        return float((self._errors_among(numbers) / numbers).mean())

    @property
    def excess_aurc(self) -> float:
        """AURC above that of the same errors in the best order, all of them last (ibid.)."""
        numbers = np.arange(1, self.samples + 1)
        right = self.samples - self.errors[-1]
        return self.aurc - float((np.maximum(numbers - right, 0) / numbers).mean())

    def accuracy_at(self, coverage: float) -> float:
        """Accuracy of the most confident samples, that share of all (rounded up; at least one)."""
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage {coverage} must be above 0 and at most 1")
        number = max(1, math.ceil(coverage * self.samples - 1e-9))
        return 1 - float(self._errors_among(np.array([number]))[0]) / number

    def curve(self, points: int = 100) -> tuple[Array, Array]:
        """Coverage and risk at up to so many evenly spaced numbers of answers, all N the last."""
        numbers = np.unique(np.ceil(self.samples * np.arange(1, points + 1) / points).astype(int))
        return numbers / self.samples, self._errors_among(numbers) / numbers

    def _errors_among(self, numbers: NDArray[np.int64]) -> Array:
        """Expected errors among so many most confident samples."""
        answered, errors = (np.concatenate([[0], x]) for x in (self.answered, self.errors))
        return np.interp(numbers, answered, errors)


def risk_coverage(confidence: Array, correct: NDArray[np.bool_]) -> RiskCoverage:
    """Both [N]; raises ValueError where N is 0."""
    if not len(confidence):
        raise ValueError("risk and coverage need samples")
    values, which = np.unique(-confidence, return_inverse=True)
    answered = np.bincount(which, minlength=len(values))
    errors = np.bincount(which[~correct], minlength=len(values))
    return RiskCoverage(-values, np.cumsum(answered), np.cumsum(errors))


def fit_threshold(
    held_out_confidence: Array, held_out_correct: NDArray[np.bool_], risk: float
) -> float | None:
    """The lowest confidence to answer from, so that at most a share `risk` of answers is wrong.

    On the held-out samples [N], that is; on others it holds about. None where no threshold does.
    """
    curve = risk_coverage(held_out_confidence, held_out_correct)
    enough = np.flatnonzero(curve.risk <= risk)
    return float(curve.thresholds[enough[-1]]) if len(enough) else None
