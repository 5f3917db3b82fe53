"""What may decide, and what is reported: two types, so that no test sample enters a fit."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.data.rng import key64
from bigbatch.trainers.ensemble.combination import Combination, Logits
from bigbatch.trainers.evaluation.metrics import Labels, Probabilities


@dataclass(frozen=True, eq=False)
class _Samples:
    """Members' logits [M, N, C] of a split, its labels [N] and the samples' keys [N].

    Keys must tell samples apart across splits: archives may number each split from 0.
    """

    logits: Logits
    labels: Labels
    keys: Sequence[str]
    split: str

    def __post_init__(self) -> None:
        """Raises ValueError where shapes, labels or keys cannot belong together."""
        if self.logits.ndim != 3 or not self.logits.shape[0]:
            raise ValueError(f"logits of shape {self.logits.shape}; [members, N, classes] wanted")
        _, samples, classes = self.logits.shape
        if odd := [m for m, member in enumerate(self.logits) if not np.isfinite(member).all()]:
            raise ValueError(f"member {odd[0]} has a logit that is not finite")
        if self.labels.shape != (samples,) or len(self.keys) != samples:
            raise ValueError(
                f"logits of {samples} samples, labels of shape {self.labels.shape} and "
                f"{len(self.keys)} keys do not belong together"
            )
        if samples and not 0 <= self.labels.min() <= self.labels.max() < classes:
            raise ValueError(f"labels {self.labels.min()} to {self.labels.max()}; they must be "
                             f"0 to {classes - 1}")  # fmt: skip
        key, times = Counter(self.keys).most_common(1)[0] if samples else ("", 1)
        if times > 1:
            raise UserError(
                f"sample {key!r} is {times} times in {self.split!r}, and would both decide and be "
                "judged; shard anew so that each is there once"
            )

    def of_members(self, members: Sequence[int]) -> Self:
        """The same samples, of these members alone."""
        return replace(self, logits=self.logits[list(members)])


def check_decides(split: str) -> None:
    """Raise UserError for the split `test`, which only is reported."""
    if split.strip().casefold() == "test":
        raise UserError(
            f"the split {split!r} would decide on the ensemble; what decides may not be "
            "reported on: name a validation split (data.val)"
        )


class FitData(_Samples):
    """Samples that may decide: every `fit_...` and selection takes these, and nothing else.

    Raises UserError for the split `test`, which only is reported.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decides(self.split)

    def rows(self, which: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "FitData":
        """Some of the samples."""
        keys = np.asarray(self.keys, object)[which].tolist()
        return FitData(self.logits[:, which], self.labels[which], keys, self.split)


class ReportData(_Samples):
    """Samples that only are reported on: no fit takes them."""


def report(combination: Combination, fitted_on: FitData, data: ReportData) -> Probabilities:
    """Probabilities [N, C] of what was fitted elsewhere.

    Raises UserError, which names one, where a sample decided and would be reported.
    """
    shared = set(fitted_on.keys) & set(data.keys)
    if shared:
        raise UserError(
            f"{len(shared):,} samples, such as {min(shared)!r}, are in {fitted_on.split!r}, which "
            f"decided on the ensemble, and in {data.split!r}, which is to be reported; report "
            "another split, or shard anew so that splits share no sample"
        )
    return combination.apply(data.logits)


def fold_of(data: FitData, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """The fold [N] of each sample, by its key: neither order nor ranks change it.

    Stratified: a class's samples, sorted by a hash of seed and key, are dealt to the folds in
    turn, and the next class goes on where it ended. So sizes differ by one at most, and all folds
    but one hold a sample of every class that has two. Raises UserError where there are fewer
    samples than folds.
    """
    if not 2 <= folds <= len(data.keys):
        raise UserError(
            f"{folds} folds of {len(data.keys)} samples of {data.split!r}; there must be 2 or more "
            "folds, and a sample in each: use fewer folds, or a larger split"
        )
    hashes = np.array([key64("fold", seed, key) for key in data.keys], np.uint64)
    order = np.lexsort((hashes, data.labels))
    fold = np.empty(len(order), np.int64)
    fold[order] = np.arange(len(order)) % folds
    return fold
