"""Whether confidence can be believed, and the temperature that mends it. NumPy only."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.trainers.evaluation.metrics import ECE_BINS, Labels, Probabilities, width_bins
from bigbatch.trainers.evaluation.outcomes import Array, row_chunks
from bigbatch.trainers.evaluation.sums import ExactSum, SparseSum

TEMPERATURES = (0.01, 100.0)  # between which one is fitted
_PRECISION = 1e-10  # relative
_ITERATIONS = 200


@dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy by bin; every field is a column [bins], NaN where a bin is empty."""

    count: NDArray[np.int64]
    confidence: Array
    accuracy: Array

    @property
    def error(self) -> float:
        """Expected calibration error: the mean gap over samples (Guo et al. 2017, eq. 3)."""
        filled = self.count > 0
        gap = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float((gap * self.count[filled]).sum() / self.count.sum())


def reliability(
    confidence: Array, correct: NDArray[np.bool_], bins: int = ECE_BINS, *, equal_mass: bool = False
) -> Reliability:
    """By bins of equal width, or of nearly equal numbers of samples (Roelofs et al. 2022).

    With equal mass, equal confidences share a bin, so that the order of samples does not count.
    Both [N].
    """
    if equal_mass:
        before = np.searchsorted(np.sort(confidence), confidence)  # samples of less confidence
        which = before * bins // max(1, len(confidence))
    else:
        which = width_bins(confidence, bins)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 of an empty bin
        return Reliability(
            count,
            np.bincount(which, confidence, minlength=bins) / count,
            np.bincount(which, correct, minlength=bins) / count,
        )


class ClasswiseError:
    """Class-wise calibration error: ECE of each class's probability, averaged over all classes.

    Of p_c against "the label is c", in bins of equal width (Kull et al. 2019; the static
    calibration error of Nixon et al. 2019). Sums are kept, no N x C: of the first bin [C], and of
    those of the others that occur, which are few where classes are many.
    """

    def __init__(self, classes: int, bins: int = ECE_BINS) -> None:
        self._classes, self._bins = classes, bins
        self._samples = np.zeros((), np.int64)
        self._first = ExactSum(classes)
        self.above = SparseSum()

    def add(self, probabilities: Probabilities, labels: Labels) -> None:
        """Rows [n, C] and their labels [n]."""
        self._samples += len(labels)
        for rows in row_chunks(len(labels), self._classes):
            p, label = probabilities[rows], labels[rows]
            # A row has fewer than `bins` probabilities above 1 / bins: all others are in bin 0.
            row, column = np.nonzero(p * self._bins > 1)
            above = p[row, column]
            first = -p.sum(axis=0)
            np.add.at(first, column, above)
            self._first.add(first)
            self.above.add_at(column * self._bins + width_bins(above, self._bins), -above)
            bins = width_bins(p[np.arange(len(label)), label], self._bins)
            ones, low = np.ones(len(label)), bins == 0
            self._first.add_at(label[low], ones[low])
            self.above.add_at((label * self._bins + bins)[~low], ones[~low])

    def sums(self) -> list[NDArray[Any]]:
        """What ranks may add up in place: each has seen other samples. So has `above`."""
        return [self._samples, self._first.parts]

    @property
    def error(self) -> float:
        total = np.abs(self._first.total).sum() + np.abs(self.above.total).sum()
        return float(total / (self._samples * self._classes))


def tempered(probabilities: Probabilities, temperature: float) -> Probabilities:
    """p^(1/T), rows summing to 1 again [N, C]: the logits divided by T.

    Guo et al. 2017, section 4.2. A probability of 0 stays 0. Raises ValueError where T is not
    above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    if temperature == 1:
        return probabilities
    powers, _ = _powers(probabilities, 1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(held_out: Probabilities, labels: Labels) -> float:
    """The temperature T with the least NLL of p^(1/T), within `TEMPERATURES`.

    `held_out` [N, C] and `labels` [N] must not be what is reported on. For an ensemble these are
    the combined probabilities: calibrated members make an under-confident mean (Rahaman and
    Thiery 2021; Ashukha et al. 2020). The NLL is convex in 1/T, and its slope is found to 0 by
    Newton's method inside a bracket. All in float64 logarithms, as probabilities near 0 and 1
    would lose what tells them apart.

    It is 1 where nothing says how sure to be: every answer is right, so that sharper is always
    better here and a single wrong one would cost anything elsewhere; or none carries information
    (one class, or all equally probable). Samples whose label has probability 0 have it at any
    temperature and do not count. Raises ValueError without samples, and for NaN.
    """
    if not len(labels) or any(np.isnan(held_out[r]).any() for r in row_chunks(*held_out.shape)):
        raise ValueError("a temperature needs samples, and probabilities that are numbers")
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    slope_low, slope_high = _slopes(held_out, labels, low)[0], _slopes(held_out, labels, high)[0]
    if slope_high <= 0:
        return 1.0
    if slope_low >= 0:
        return TEMPERATURES[1]
    inverse = 1.0
    for _ in range(_ITERATIONS):
        slope, bend = _slopes(held_out, labels, inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        after = inverse - slope / bend if bend > 0 else low
        if abs(after - inverse) <= _PRECISION * inverse:
            break
        # Halving, by ratio, where Newton's step leaves the bracket.
        inverse = after if low < after < high else (low * high) ** 0.5
    return 1 / inverse


def _slopes(probabilities: Probabilities, labels: Labels, inverse: float) -> tuple[float, float]:
    """First and second derivative of the summed NLL by 1/T: E[log p] - log p_label, Var[log p].

    Expectations under p^(1/T); logarithms are taken of p over the largest of its row, which
    leaves both as they are.
    """
    slope = bend = 0.0
    for rows in row_chunks(len(labels), probabilities.shape[1]):
        powers, logs = _powers(probabilities[rows], inverse)
        weights = powers / powers.sum(axis=1, keepdims=True)
        mean = (weights * logs).sum(axis=1)
        numbers = np.arange(len(mean))
        counts = probabilities[rows][numbers, labels[rows]] > 0
        slope += float((mean - logs[numbers, labels[rows]])[counts].sum())
        deviation = logs - mean[:, None]
        bend += float((weights * deviation**2).sum(axis=1)[counts].sum())
    return slope, bend


def _powers(probabilities: Probabilities, exponent: float) -> tuple[Array, Array]:
    """(p / max p)^exponent [N, C], and log(p / max p), taken as 0 where p is."""
    p = probabilities.astype(np.float64, copy=False)
    there = p > 0
    logs = np.log(p, out=np.zeros_like(p), where=there)
    logs = np.where(there, logs - logs.max(axis=1, keepdims=True, where=there, initial=-np.inf), 0)
    return np.exp(exponent * logs) * there, logs
