"""What a set of predicted probabilities is worth. NumPy only."""

import numpy as np
import numpy.typing as npt

from bigbatch.trainers.evaluation.accuracy import Labels as Labels
from bigbatch.trainers.evaluation.accuracy import balanced_accuracy

Logits = npt.NDArray[np.float32]  # [M, N, C]: members, samples, classes
Probabilities = npt.NDArray[np.float64]  # [N, C], rows sum to 1
ECE_BINS = 15


def softmax(logits: npt.NDArray[np.floating]) -> Probabilities:
    """Row-wise softmax in float64; logits [N, C]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def score(probabilities: Probabilities, labels: Labels) -> dict[str, float]:
    """Accuracy and balanced accuracy in [0, 1], mean NLL in nats, Brier score and ECE."""
    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": balanced_accuracy(labels, predicted, probabilities.shape[1]),
        "nll": nll(probabilities, labels),
        "brier": brier(probabilities, labels),
        "ece": calibration_error(probabilities, labels),
    }


def nll(probabilities: Probabilities, labels: Labels) -> float:
    chosen = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(chosen, np.finfo(np.float64).tiny)).mean())


def brier(probabilities: Probabilities, labels: Labels) -> float:
    """Mean squared distance to the one-hot label, summed over classes (Brier 1950)."""
    chosen = probabilities[np.arange(len(labels)), labels]
    return float(((probabilities**2).sum(axis=1) - 2 * chosen + 1).mean())


def calibration_error(probabilities: Probabilities, labels: Labels, bins: int = ECE_BINS) -> float:
    """Expected calibration error with equal-width bins (Guo et al. 2017, eq. 3)."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    gap = np.bincount(width_bins(confidence, bins), correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def confusion(labels: Labels, predicted: Labels, classes: int) -> npt.NDArray[np.int64]:
    """Counts [C, C]: row = true class, column = predicted class. Of many classes take pairs."""
    pairs = labels * classes + predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def width_bins(values: npt.NDArray[np.float64], bins: int = ECE_BINS) -> npt.NDArray[np.int64]:
    """The bin of each value in [0, 1]: bin k is (k / bins, (k + 1) / bins], as in Guo et al."""
    return np.clip(np.ceil(values * bins).astype(np.int64) - 1, 0, bins - 1)
