"""`bigbatch ensemble`: members chosen and combined on one split, reported on another."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from google_crc32c import value as crc32c

from bigbatch.configs.errors import UserError
from bigbatch.data.listing import Listing
from bigbatch.trainers.ensemble.combination import Logits
from bigbatch.trainers.ensemble.evaluations import statistics_of
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.ensemble.held_out import FitData, ReportData, report
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.ensemble.selection import CrossFitted, cross_fit, fit_ensemble
from bigbatch.trainers.evaluation.conformal import fit_sets
from bigbatch.trainers.evaluation.metrics import Labels
from bigbatch.trainers.evaluation.statistics import Statistics

# How members may be combined: those of a Combination, weights by greedy selection, and one model
# of their features.
FEATURES = "features"
METHODS = ("mean", "logits", "weights", "greedy", "vote", "stack", "boost", FEATURES)
_LEVEL = 0.9  # of the conformal sets


@dataclass(frozen=True)
class Plan:
    """How an ensemble is made."""

    method: str = "mean"
    margin: float = 1.0  # a member takes part if its accuracy is this near the best one's
    coverage: float | None = None  # reject the least certain beyond this share
    folds: int = 5
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Made:
    """An ensemble, and what it is worth on the split that decided and on the one that did not."""

    ensemble: Ensemble
    fitted: dict[str, Any]  # out of fold, on the split that decided
    reported: dict[str, Any] | None
    record: dict[str, Any]


def make(
    members: Ensemble,
    plan: Plan,
    fit_on: Listing,
    report_on: Listing | None,
    logits_of: Callable[[Listing], Logits],
) -> Made:
    """Fit gate, combination, temperature and rejection on `fit_on`, by `plan`; report both splits.

    Figures of `fit_on` are out of fold; those of `report_on`, which shares no sample with it, are
    of the ensemble that is kept. `logits_of` gives the logits [M, N, C] of all members.
    """
    data = fit_data(fit_on, logits_of(fit_on))
    crossed = cross_fit(
        data,
        lambda part: fit_ensemble(
            part, plan.method, margin=plan.margin, coverage=plan.coverage, seed=plan.seed
        ),
        plan.folds,
        plan.seed,
    )
    kept = crossed.fitted.members
    ensemble = Ensemble(tuple(members.members[i] for i in kept), crossed.fitted.combination)
    best = _best(members, data, kept)
    reported = None
    if report_on is not None:
        other = ReportData(
            logits_of(report_on), _labels(report_on), _keys(report_on), split_name(report_on)
        )
        report(ensemble.combination, data.of_members(kept), other.of_members(kept))
        # Fitted where neither gate nor weights nor temperature have seen the sample.
        sets = [fit_sets(crossed.probabilities, data.labels, level=_LEVEL)]
        own = other.logits[list(kept)]
        reported = statistics_of(ensemble, own, other.labels, best=best, sets=sets)
    record = {
        "method": plan.method,
        "margin": plan.margin,
        "coverage": plan.coverage,
        "candidates": [member.name for member in members.members],
        "fitted_on": _about(fit_on) | {"folds": plan.folds, "seed": plan.seed},
        "reported_on": None if report_on is None else _about(report_on),
        "kept_in_folds": _times_kept(members, crossed),
    }
    return Made(ensemble, _out_of_fold(crossed, data, ensemble, kept), reported, record)


def check_room(members: Sequence[Member], splits: Sequence[Listing]) -> None:
    """Raise UserError where rank 0 could not hold the logits that a fit goes through many times.

    Copied while they are gathered and put in order, and as probabilities in float64 out of fold.
    """
    classes = len(members[0].classes)
    samples = sum(len(split.index) for split in splits)
    need = samples * classes * (16 * len(members) + 16)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > there:
        raise UserError(
            f"{samples:,} samples x {classes:,} classes x {len(members)} members: a fit holds "
            f"their logits, about {need / 1e9:.1f} GB, and this machine has {there / 1e9:.1f} GB; "
            "fit and report smaller splits, or choose members with --members (`bigbatch evaluate "
            "RUN...` scores their mean in any memory)"
        )


def fit_data(listing: Listing, logits: Logits) -> FitData:
    """The images of a listing as those that may decide; `logits` [M, N, C] are of them."""
    return FitData(logits, _labels(listing), _keys(listing), split_name(listing))


def _out_of_fold(
    crossed: CrossFitted, data: FitData, ensemble: Ensemble, kept: tuple[int, ...]
) -> dict[str, Any]:
    """Statistics of the estimates that no sample made itself, beside those of the members."""
    statistics = Statistics(data.logits.shape[2])
    statistics.add(data.labels, crossed.probabilities)
    whole = statistics.summary()
    if len(kept) > 1:  # the members were fitted on none of these samples
        plain = Ensemble(ensemble.members, replace(ensemble.combination, temperature=1.0))
        whole["members"] = statistics_of(plain, data.logits[list(kept)], data.labels)["members"]
        del whole["members"]["against_best"]  # which would be in favour of what was fitted here
    return whole


def _best(members: Ensemble, data: FitData, kept: tuple[int, ...]) -> str:
    """The member that is most often right on the split that decides."""
    right = [float((data.logits[i].argmax(axis=1) == data.labels).mean()) for i in kept]
    return members.members[kept[int(np.argmax(right))]].name


def _times_kept(members: Ensemble, crossed: CrossFitted) -> dict[str, int]:
    """In how many folds each candidate was chosen: how sure the choice is."""
    return {
        member.name: sum(number in fold.members for fold in crossed.by_fold)
        for number, member in enumerate(members.members)
    }


def _keys(listing: Listing) -> list[str]:
    """Keys that differ between splits whose archives number their samples alike."""
    index = listing.index
    crcs = index.crc.tolist()
    if index.loose:  # image files, whose checksums no index holds
        crcs = [crc32c((index.root / file.name).read_bytes()) for file in index.shards]
    return [f"{key} {crc:08x}" for key, crc in zip(listing.keys, crcs, strict=True)]


def _labels(listing: Listing) -> Labels:
    return listing.index.label.astype(np.int64)


def split_name(listing: Listing) -> str:
    """The last part of where a listing's images are."""
    return listing.index.place.rstrip("/").rpartition("/")[2]


def _about(listing: Listing) -> dict[str, Any]:
    place, samples = listing.index.place, len(listing.index)
    return {"place": place, "data_hash": listing.index.hash, "samples": samples}
