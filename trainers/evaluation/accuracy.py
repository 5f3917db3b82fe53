"""Shares with their intervals, and right answers by class. NumPy only."""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]  # [N]
LEVEL = 0.95  # of every interval


def wilson(successes: int, samples: int, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927), which stays inside [0, 1].

    Of no samples it is (0, 1), its limit: nothing is known. Raises ValueError where `successes`
    are no part of `samples`, or `level` is not inside (0, 1).
    """
    if not 0 <= successes <= samples or not 0 < level < 1:
        raise ValueError(f"no interval of level {level} for {successes} of {samples}")
    if samples == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    share = successes / samples
    middle = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    inner = share * (1 - share) / samples + z2 / (4 * samples**2)
    half = z2**0.5 * inner**0.5 / (1 + z2 / samples)
    # Exact at both ends, where rounding would leave 1e-17.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == samples else middle + half
    return low, high


def recalls(labels: Labels, predicted: Labels, classes: int) -> NDArray[np.float64]:
    """Right answers among the samples of each class, [C]; NaN for a class without samples."""
    samples = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[labels == predicted], minlength=classes)
    return np.divide(right, samples, out=np.full(classes, np.nan), where=samples > 0)


def balanced_accuracy(labels: Labels, predicted: Labels, classes: int) -> float:
    """Mean recall of the classes that have samples, as scikit-learn's; NaN without samples."""
    of_classes = recalls(labels, predicted, classes)
    return float(of_classes[~np.isnan(of_classes)].mean()) if len(labels) else float("nan")


def confusion_pairs(labels: Labels, predicted: Labels, classes: int) -> NDArray[np.int64]:
    """Rows (true class, predicted class, count) [K, 3] of what occurs, in order of the classes.

    At most as many rows as samples, where the matrix of 100,000 classes takes 80 GB.
    """
    pairs, counts = np.unique(labels * classes + predicted, return_counts=True)
    return np.stack([pairs // classes, pairs % classes, counts], axis=1)
