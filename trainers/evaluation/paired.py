"""Whether one model is better than another on the same samples. NumPy only."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigbatch.data.rng import uniforms
from bigbatch.trainers.evaluation.accuracy import LEVEL
from bigbatch.trainers.evaluation.outcomes import Array

DRAWS = 1000


def bootstrap(
    differences: Array, seed: int = 0, *, draws: int = DRAWS, level: float = LEVEL
) -> NDArray[np.float64]:
    """Percentile intervals [K, 2] of the means of K columns of differences by sample [N, K].

    A paired bootstrap (Efron and Tibshirani 1993, chapter 13): each draw takes N
    samples with replacement, the same for all columns and for both models. Draw r is keyed by
    (seed, r). Raises ValueError where N is 0.
    """
    n = len(differences)
    if not n:
        raise ValueError("a bootstrap needs samples")
    means = np.empty((draws, differences.shape[1]))
    for draw in range(draws):
        picked = (uniforms((n,), seed, "bootstrap", draw) * n).astype(np.int64)
        np.minimum(picked, n - 1, out=picked)  # the product may round up to n
        times = np.bincount(picked, minlength=n)
        means[draw] = times @ differences / n
    tail = (1 - level) / 2
    return np.quantile(means, [tail, 1 - tail], axis=0).T


@dataclass(frozen=True)
class McNemar:
    """The samples that just one of two models gets right."""

    only_first: int
    only_second: int

    @property
    def odds(self) -> float:
        """only_first / only_second; NaN where no sample is in the second."""
        return self.only_first / self.only_second if self.only_second else math.nan

    @property
    def p_value(self) -> float:
        """Two-sided exact p-value (McNemar 1947): a fair coin tossed for each such sample."""
        n, few = self.only_first + self.only_second, min(self.only_first, self.only_second)
        # Twice the binomial tail; logarithms, as 2^n overflows from 1024 samples on.
        logs = [
            math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(few + 1)
        ]
        return min(1.0, 2 * math.fsum(math.exp(x - n * math.log(2)) for x in logs))


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> McNemar:
    """From who gets which sample right; both [N]."""
    return McNemar(int((first & ~second).sum()), int((second & ~first).sum()))
