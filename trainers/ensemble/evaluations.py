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


def statistics_of(
    ensemble: Ensemble,
    logits: Logits,
    labels: Labels,
    *,
    best: str | None = None,
    sets: Sequence[ConformalSets] = (),
) -> dict[str, Any]:
    """What docs/statistics.md lists, of the ensemble and its members' logits [M, N, C].

    `best` is the member that did best on other samples, `sets` were fitted on other samples.
    """
    members = [member.name for member in ensemble.members] if len(logits) > 1 else []
    combination = ensemble.combination
    plain = replace(combination, temperature=1.0)
    statistics = Statistics(
        len(ensemble.classes),
        members=members,
        temperature=combination.temperature,
        sets=sets,
        reject_below=combination.reject_below,
    )
    for rows in row_chunks(len(labels), logits.shape[0] * logits.shape[2]):
        own = logits[:, rows]
        each = np.stack([softmax(member) for member in own]) if members else None
        statistics.add(labels[rows], plain.apply(own), each)
    return statistics.summary(best)


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
