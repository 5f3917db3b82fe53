"""The verdict on a run that learned numbers or distributions, by its error. Free of torch."""

from collections.abc import Iterator

import numpy as np

from bigbatch.configs.judged import R2, Score
from bigbatch.trainers.report.facts import Facts
from bigbatch.trainers.report.findings import Finding, choose

_RISE = 0.15  # of the validation error over its lowest
_EXPLAINED = 0.1  # of the targets' variance: with less, little was learned
_GAP = 2.0  # validation error over that on training images
_GAIN = 0.03  # of the error, in the last fifth of the run


def fit_of_error(facts: Facts, judge: Score) -> list[Finding]:
    """As `fit.fit`, of validation scores judged by `judge`, of which less is better."""
    if not np.isfinite(facts.val[judge.key]).any():
        text = f"Validation {judge.title} was never finite."
        return [Finding("problem", "No verdict on the fit", text, "unfinished")]
    for rule in (_overfitting, _underfitting, _gap, _improving):
        if found := [*rule(facts, judge)]:
            return found
    return [_converged(facts, judge)]


def _overfitting(facts: Facts, judge: Score) -> Iterator[Finding]:
    error, step = facts.val[judge.key], facts.val["step"]
    low = int(np.nanargmin(error))
    rise = float(error[-1] / max(error[low], 1e-300) - 1)
    if not (rise >= _RISE and facts.at(step[-1]) < facts.at(step[low])):  # nor where one is NaN
        return
    turns = [("augment.mixup", 0.2), ("regularise.early_stop", {"patience": 5})]
    yield Finding(
        "problem",
        "Over-fitting",
        f"Validation {judge.title} was lowest at step {step[low]:,.0f} ({judge.text(error[low])}) "
        f"and has risen by {rise:.0%} since, while the training loss fell on. Train for less long, "
        "or add augmentation, mixup or weight decay.",
        "overfitting",
        {"lowest": float(error[low]), "step": int(step[low]), judge.key: float(error[-1])},
        choose(facts.recipe, turns),
    )


def _underfitting(facts: Facts, judge: Score) -> Iterator[Finding]:
    found = facts.val.get(R2.key)
    if found is None or not found[-1] < _EXPLAINED:
        return
    yield Finding(
        "problem",
        "Under-fitting",
        f"Predictions explain {max(0.0, float(found[-1])):.0%} of the variance of the validation "
        "targets: hardly more than their mean does. Train longer or at another rate, or take a "
        "larger network.",
        "underfitting",
        {R2.key: float(found[-1]), judge.key: float(facts.val[judge.key][-1])},
    )


def _gap(facts: Facts, judge: Score) -> Iterator[Finding]:
    errors = facts.probe.get("errors") or {}
    train, val = ((errors.get(split) or {}).get(judge.key) for split in ("train", "val"))
    if train is None or val is None or not val > _GAP * train > 0:
        return
    yield Finding(
        "note",
        "Wide gap to validation",
        f"{judge.title} on training images, seen as validation images are, is {judge.text(train)}, "
        f"on validation images {judge.text(val)}. More images, augmentation or regularisation may "
        "narrow the gap.",
        "gap",
        {"train": train, "val": val},
        choose(facts.recipe, [("augment.mixup", 0.2)]),
    )


def _improving(facts: Facts, judge: Score) -> Iterator[Finding]:
    gain, best = _late_gain(facts, judge)
    length = facts.recipe.duration
    if gain < _GAIN or best < len(facts.val["step"]) - 2:
        return
    yield Finding(
        "note",
        "Still improving at the end",
        f"The last fifth of the run lowered the best validation {judge.title} by {gain:.0%}. A "
        "longer run would probably gain more.",
        "improving",
        {"gain": gain},
        choose(facts.recipe, [("duration", f"{2 * length.value:g} {length.unit}")]),
    )


def _late_gain(facts: Facts, judge: Score) -> tuple[float, int]:
    """By what share the last fifth of the run lowered the best error; where that was reached."""
    error, step = facts.val[judge.key], facts.val["step"]
    late = step > step[-1] * 0.8
    before = float(np.nanmin(error[~late])) if (~late).any() else float("nan")
    gain = 1 - float(np.nanmin(error[late])) / before if before > 0 else 0.0
    return gain, int(np.nanargmin(error))


def _converged(facts: Facts, judge: Score) -> Finding:
    error, step = facts.val[judge.key], facts.val["step"]
    gain, best = _late_gain(facts, judge)
    return Finding(
        "good",
        "Converged",
        f"Validation {judge.title} reached {judge.text(error[best])} at step {step[best]:,.0f}, "
        f"and the last fifth of the run lowered the best by {max(0.0, gain):.1%}.",
        "converged",
        {judge.key: float(error[best]), "step": int(step[best]), "gain": gain},
    )
