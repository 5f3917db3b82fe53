"""Probabilities boiled down to six numbers a sample, from which most statistics follow.

A million samples of a thousand classes are 8 GB of probabilities and 48 MB of outcomes, so
whatever needs no other probability than the label's is computed from these. NumPy only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from bigbatch.trainers.evaluation.accuracy import balanced_accuracy
from bigbatch.trainers.evaluation.metrics import ECE_BINS, Labels, softmax, width_bins

Array = NDArray[np.float64]
_NUMBERS = 2**18  # in a chunk of rows: 2 MB, which a few temporaries of its size may multiply
_BLOCK, _PIECES = 2**14, 2**10  # samples that are joined, and pieces that wait for it, at most
_SUM_TOLERANCE = 1e-4  # what float32 may be off by over thousands of classes


@dataclass(frozen=True)
class Outcomes:
    """What one model says of N samples; every field is a column [N]."""

    label: Labels
    predicted: Labels  # the most probable class, the first of equals
    confidence: Array  # its probability
    chosen: Array  # the probability of the label
    squares: Array  # the sum of the squared probabilities
    rank: NDArray[np.int64]  # classes before the label, by falling probability, then by number

    def __len__(self) -> int:
        return len(self.label)

    @property
    def correct(self) -> NDArray[np.bool_]:
        return self.predicted == self.label

    @property
    def losses(self) -> Array:
        """Negative log-likelihood of each sample, in nats; of probability 0, about 708."""
        return losses_of(self.chosen)

    def top(self, k: int) -> NDArray[np.bool_]:
        """Whether the label is among the k most probable classes.

        Of equally probable classes the one with the smaller number comes first, as for argmax:
        so k = 1 is `correct`, and a model that finds all classes equally probable is right in
        k / C of the cases, not in all.
        """
        return self.rank < k

    def scores(self) -> dict[str, float]:
        """Those of `metrics.score`, bit for bit."""
        gap = np.bincount(
            width_bins(self.confidence), self.correct - self.confidence, minlength=ECE_BINS
        )
        return {
            "accuracy": float(self.correct.mean()),
            "balanced_accuracy": balanced_accuracy(
                self.label,
                self.predicted,
                1 + int(max(self.label.max(initial=0), self.predicted.max(initial=0))),
            ),
            "nll": float(self.losses.mean()),
            "brier": float((self.squares - 2 * self.chosen + 1).mean()),
            "ece": float(np.abs(gap).sum() / len(self)),
        }


def losses_of(chosen: Array) -> Array:
    """Negative log-likelihoods of labels whose probabilities are these."""
    return -np.log(np.maximum(chosen, np.finfo(np.float64).tiny))


def outcomes(probabilities: NDArray[np.floating], labels: Labels) -> Outcomes:
    """Outcomes of probabilities [N, C] of any float type, and labels [N].

    Raises ValueError for labels that are no class, and rows that are no probabilities, such as
    logits or NaN: a NaN would else be ranked like a right answer.
    """
    n, classes = probabilities.shape
    if labels.shape != (n,) or (n and not 0 <= labels.min() <= labels.max() < classes):
        raise ValueError(f"labels {labels.shape} must be {n} numbers from 0 to {classes - 1}")
    return join([_of_rows(probabilities[r], labels[r]) for r in row_chunks(n, classes)])


def outcomes_of(logits: NDArray[np.floating], labels: Labels) -> Outcomes:
    """Outcomes of the softmax of logits [N, C].

    Of those that are not finite too, so that weights gone wrong have scores, which are NaN.
    """
    chunks = row_chunks(*logits.shape)
    return join([outcomes_of_rows(softmax(logits[rows]), labels[rows]) for rows in chunks])


def _of_rows(probabilities: NDArray[np.floating], labels: Labels) -> Outcomes:
    p = probabilities.astype(np.float64, copy=False)
    wrong = ~(np.abs(p.sum(axis=1) - 1) <= _SUM_TOLERANCE) | (p.min(axis=1) < 0)
    if wrong.any():
        row = p[wrong.argmax()]
        raise ValueError(f"{row} is no row of probabilities: they are 0 or more, and sum to 1")
    return outcomes_of_rows(p, labels)


def outcomes_of_rows(p: Array, labels: Labels) -> Outcomes:
    """Outcomes of a few rows of float64 [N, C], which are not looked at."""
    predicted = p.argmax(axis=1)
    rows = np.arange(len(p))
    chosen = p[rows, labels]
    level = chosen[:, None]
    equal_before = (p == level) & (np.arange(p.shape[1]) < labels[:, None])
    return Outcomes(
        label=labels,
        predicted=predicted,
        confidence=p[rows, predicted],
        chosen=chosen,
        squares=(p**2).sum(axis=1),
        rank=np.count_nonzero((p > level) | equal_before, axis=1),
    )


def join(parts: Sequence[Outcomes]) -> Outcomes:
    """The outcomes of all parts, in their order."""
    if not parts:
        none, zero = np.empty(0, np.int64), np.empty(0)
        return Outcomes(none, none, zero, zero, zero, none)
    names = [field.name for field in fields(Outcomes)]
    return Outcomes(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Collected:
    """Outcomes that come in pieces, of two samples where classes are many.

    A piece takes ten times the memory of its numbers, so that they are joined to larger ones.
    """

    def __init__(self) -> None:
        self._blocks: list[Outcomes] = []
        self._pieces: list[Outcomes] = []
        self._samples = 0

    def add(self, piece: Outcomes) -> None:
        self._pieces.append(piece)
        self._samples += len(piece)
        if self._samples >= _BLOCK or len(self._pieces) >= _PIECES:
            self._blocks.append(join(self._pieces))
            self._pieces, self._samples = [], 0

    def whole(self) -> Outcomes:
        """All of them so far, in the order in which they came."""
        whole = join([*self._blocks, *self._pieces])
        self._blocks, self._pieces, self._samples = [whole], [], 0
        return whole

    def put(self, whole: Outcomes) -> None:
        """Take these in place of those that were added."""
        self._blocks, self._pieces, self._samples = [whole], [], 0


def to_rows(of: Outcomes) -> Array:
    """The columns side by side [N, 6], in which form ranks pass them on."""
    return np.stack([getattr(of, field.name) for field in fields(Outcomes)], axis=1)


def from_rows(rows: Array) -> Outcomes:
    """What `to_rows` was made of: whole numbers below 2^53 are exact."""
    label, predicted, confidence, chosen, squares, rank = rows.T
    whole = (column.astype(np.int64) for column in (label, predicted, rank))
    return Outcomes(next(whole), next(whole), confidence, chosen, squares, next(whole))


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices that cover all rows, each of 2 MB of numbers where a row has `width` of them."""
    step = max(1, _NUMBERS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
