"""Statistics of an ensemble from its members' logits, and what they are statistics of."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.data.index import Index
from bigbatch.trainers.ensemble.combination import Logits
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.evaluation.conformal import ConformalSets
from bigbatch.trainers.evaluation.metrics import Labels, softmax
from bigbatch.trainers.evaluation.outcomes import row_chunks
from bigbatch.trainers.evaluation.statistics import Statistics


class EnsembleStatistics:
    """What docs/statistics.md lists, of an ensemble whose members' logits may come in pieces.

    `sets` were fitted on other samples. Ranks add `statistics` up, which hold no logits.
    """

    def __init__(self, ensemble: Ensemble, sets: Sequence[ConformalSets] = ()) -> None:
        combination = ensemble.combination
        self._alone = len(ensemble.members) == 1
        self._plain = replace(combination, temperature=1.0)
        self.statistics = Statistics(
            len(ensemble.classes),
            members=[] if self._alone else [member.name for member in ensemble.members],
            temperature=combination.temperature,
            sets=sets,
            reject_below=combination.reject_below,
        )

    def add(self, logits: Logits, labels: Labels) -> None:
        """Logits [M, n, C] and labels [n]. ValueError where a logit is not finite."""
        for rows in row_chunks(len(labels), logits.shape[0] * logits.shape[2]):
            own = logits[:, rows]
            each = None if self._alone else np.stack([softmax(member) for member in own])
            self.statistics.add(labels[rows], self._plain.apply(own), each)


def statistics_of(
    ensemble: Ensemble,
    logits: Logits,
    labels: Labels,
    *,
    best: str | None = None,
    sets: Sequence[ConformalSets] = (),
) -> dict[str, Any]:
    """`EnsembleStatistics` of whole arrays: logits [M, N, C] and labels [N].

    `best` is the member that did best on other samples.
    """
    found = EnsembleStatistics(ensemble, sets)
    found.add(logits, labels)
    return found.statistics.summary(best)


def about(
    ensemble: Ensemble, models: Sequence[Path], index: Index, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """What an evaluation is of: these models' members, on the images of `index`."""
    return {
        "source": index.place,
        "data_hash": index.hash,
        "notes": list(notes),
        "models": [str(path) for path in models],
        "member_names": [member.name for member in ensemble.members],
        "combination": ensemble.combination.method,
        "tta": "none",
        "mc_dropout": 0,
    }
