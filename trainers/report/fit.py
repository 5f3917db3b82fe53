"""Rules for how a run that is over has learned: docs/diagnosis.md has them. Free of torch."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from bigbatch.configs.judged import ACCURACY, judged_in
from bigbatch.data.writing.sources import printable
from bigbatch.trainers.evaluation.accuracy import wilson
from bigbatch.trainers.monitoring.history import Record
from bigbatch.trainers.report.errors import fit_of_error
from bigbatch.trainers.report.facts import POOR, SIGMAS, Facts, compared, gap
from bigbatch.trainers.report.findings import Finding, Turn, choose, times, what_if

_GAP = 0.1  # of accuracies on training and validation images
_LEARNED = 0.2  # above chance: with less there is nothing to compare
_AT_CHANCE = 0.15  # of what training images gained over chance
_RISE, _LEAST_RISE = 0.15, 0.05  # of the validation loss over its lowest: by share, and in nats
_SLOW = 0.25  # of the loss of who knows the classes' shares: below it nobody calls a run slow
_LINEAR = 0.3  # share of the fall in the second half of learning-rate time; a line has 0.5
_FLAT = 0.02  # of the loss, from the third quarter of a run to the fourth
_FITTED = 0.98  # accuracy on training images above which a flat loss is the end
_FEW = 10  # validation samples of a class, below which its recall says nothing


def fit(facts: Facts) -> list[Finding]:
    """The verdict on a run that nothing broke."""
    apart = [*mismatch(facts)] or [*starved(facts)]
    if apart:
        return apart
    judge = judged_in(facts.val)
    if judge is not None and judge != ACCURACY and len(facts.val["step"]) >= 4:
        return fit_of_error(facts, judge)
    if len(facts.val.get("step", ())) < 4 or not {"accuracy", "nll"} <= facts.val.keys():
        text = "Fewer than 4 evaluations are recorded."
        return [Finding("note", "No verdict on the fit", text, "unfinished")]
    settled = (too_slow, plateau, hard_class)
    for rule in (*settled, overfitting, underfitting, wide_gap, overconfident, improving):
        if found := [*rule(facts)]:
            return found
    return [converged(facts)]


def mismatch(facts: Facts) -> Iterator[Finding]:
    """Validation that was far behind when training had come half its way; or well ahead of it."""
    pairs = [probe for probe in facts.probes if compared(probe)]
    if not pairs:
        return
    last, chance = pairs[-1], float(np.exp(-pairs[-1]["prior_nll"]))
    wide, error = gap(last)
    train, val = last["train"]["accuracy"], last["val"]["accuracy"]
    if -wide > max(_GAP / 2, SIGMAS * error):
        text = (
            f"Validation images are right by {val:.1%}, training images, seen as they are, by "
            f"{train:.1%}: the validation split is easier, holds images that are trained on "
            "(`bigbatch inspect`), or labels of the training split are wrong more often."
        )
        evidence = {"step": last["step"], "train": last["train"], "val": last["val"]}
        yield Finding("note", "Validation is easier than training", text, "mismatch", evidence)
    if train - chance < _LEARNED or wide < max(_GAP, SIGMAS * error):
        return
    half = next(p for p in pairs if p["train"]["accuracy"] - chance >= (train - chance) / 2)
    then, error = gap(half)
    learned = [
        (p["val"]["accuracy"] - chance) / (p["train"]["accuracy"] - chance) for p in (half, last)
    ]
    lagging = learned[0] < 0.5 and learned[1] < 0.6
    if half is last:  # nothing is known of the way there
        lagging = learned[1] < _AT_CHANCE
    if then < max(_GAP, SIGMAS * error) or not lagging:
        return
    yield Finding(
        "problem",
        "Training and validation do not match",
        f"At step {half['step']:,} training images were right by {half['train']['accuracy']:.1%}, "
        f"validation images by {half['val']['accuracy']:.1%}, at the end by {train:.1%} and "
        f"{val:.1%}. Over-fitting comes later than that: labels or images of the splits data.train "
        "and data.val differ. `bigbatch inspect` shows both; write them with one `bigbatch shard`.",
        "mismatch",
        {"step": half["step"], "train": half["train"], "val": half["val"], "end": last["val"]},
    )


def starved(facts: Facts) -> Iterator[Finding]:
    """Classes that are rare in training, and little recalled."""
    return _left_behind(facts, rare=True)


def hard_class(facts: Facts) -> Iterator[Finding]:
    """Those that are not rare: of a run that had come to rest, and learned the others."""
    return iter(()) if facts.poor else _left_behind(facts, rare=False)


def _left_behind(facts: Facts, rare: bool) -> Iterator[Finding]:
    rows = facts.probe.get("classes") or []
    mean = float(facts.probe.get("balanced_accuracy") or 0.0)
    chance = float(np.exp(-facts.probe.get("prior_nll", 0.0)))
    usual = facts.probe.get("trained_mean")

    def is_rare(row: Record) -> bool:
        if usual is None or row.get("trained") is None:
            return False
        return bool(row["trained"] < usual / 2)

    def is_worse(row: Record) -> bool:
        most = wilson(round(row["recall"] * row["samples"]), row["samples"])[1]
        if rare:  # there is a reason, so that a recall clearly below the mean will do
            return bool(row["recall"] < mean / 2 and most < mean)
        return most < mean / 2

    found = [r for r in rows if r["samples"] >= _FEW and is_rare(r) == rare and is_worse(r)]
    if not found or mean < chance + _LEARNED:
        return
    worst = found[0]
    trained = worst.get("trained")
    others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    seen = f" It has {trained:,} training images, a class {usual:,.0f} on average." if usual else ""
    text = (
        f"Recall of class {printable(worst['name'])}{others} is {worst['recall']:.1%} of "
        f"{worst['samples']} validation images, {mean:.1%} on average over classes.{seen}"
    )
    if not rare:
        text += " It is not rare: look at its labels with `bigbatch inspect`."
    turns = [("data.sampling", "balanced"), ("loss.class_weights", "balanced")]
    yield Finding(
        "problem",
        "Starved class",
        text,
        "starved",
        {"classes": found, "balanced_accuracy": mean},
        choose(facts.recipe, [*turns, ("loss.name", "ldam")]) if rare else None,
    )


def _rise(facts: Facts) -> tuple[float, str, dict[str, Any]]:
    """By how many nats the validation loss rose while training's fell on, and in words."""
    nll, step = facts.val["nll"], facts.val["step"]
    low = int(np.nanargmin(nll))
    rise = float(nll[-1] - nll[low])
    share = rise / max(float(nll[low]), 1e-12)
    evidence = {"lowest_nll": float(nll[low]), "step": int(step[low]), "nll": float(nll[-1])}
    fell = facts.at(step[-1]) < facts.at(step[low])
    samples = (facts.probe.get("val") or {}).get("samples")
    least = _RISE
    if samples and "accuracy" in facts.val:
        # Most of the loss is that of images that are wrong: of few, their number is chance.
        least = max(least, max(1.0, samples * (1 - facts.val["accuracy"][low])) ** -0.5)
    if not (rise >= _LEAST_RISE and share >= least and fell):  # nor where one of them is NaN
        return 0.0, "", evidence
    return (
        rise,
        f"Validation loss was lowest at step {step[low]:,.0f} ({nll[low]:.3f}) and has risen by "
        f"{share:.0%} since, while the training loss fell on.",
        evidence,
    )


def _apart(facts: Facts) -> bool:
    """Whether training images are right clearly more often than validation images."""
    if not compared(facts.probe):
        return False
    apart, error = gap(facts.probe)
    return apart > max(_GAP, SIGMAS * error)


def _both(facts: Facts) -> str:
    train, val = facts.probe["train"], facts.probe["val"]
    return (
        f"Training images, seen as validation images are, are right by {train['accuracy']:.1%}, "
        f"validation images by {val['accuracy']:.1%}."
    )


def overfitting(facts: Facts) -> Iterator[Finding]:
    """A run that went on past its best, or that learned little but its training images.

    A gap alone is neither: many networks fit all of a small split and get better to the end.
    """
    accuracy = facts.val["accuracy"]
    rise, said, evidence = _rise(facts)
    best, wide = float(np.nanmax(accuracy)), _apart(facts)
    worse = best - accuracy[-1] > max(0.01, facts.noise(best))
    if compared(facts.probe):
        evidence |= {split: facts.probe[split] for split in ("train", "val")}
    else:
        worse |= accuracy[-1] < 0.9
    by_heart = wide and not facts.poor and (facts.val_left or 0.0) > POOR
    if not (by_heart or (rise and (wide or worse))):
        return
    text = f"{said} {_both(facts) if wide else ''}".strip()
    text += " Train for less long, or add augmentation, mixup or weight decay."
    yield Finding("problem", "Over-fitting", text, "overfitting", evidence, _regularise(facts))


def wide_gap(facts: Facts) -> Iterator[Finding]:
    if not _apart(facts):
        return
    yield Finding(
        "note",
        "Wide gap to validation",
        f"{_both(facts)} The run did not pass its best; more images, augmentation or "
        "regularisation may narrow the gap.",
        "gap",
        {split: facts.probe[split] for split in ("train", "val")},
        _regularise(facts),
    )


def _regularise(facts: Facts) -> Turn | None:
    decay = getattr(facts.recipe.optimizer, "weight_decay", 0.0)
    affine = {"degrees": 10, "translate": 0.1, "scale": 0.1}
    candidates: list[tuple[str, Any]] = []
    if not facts.recipe.augment.mixup:
        candidates.append(("augment.mixup", 0.2))
    if facts.recipe.augment.affine is None and facts.recipe.augment.crop is None:
        candidates.append(("augment.affine", affine))
    candidates.append(("optimizer.weight_decay", times(decay, 10) if decay else 0.01))
    return choose(facts.recipe, candidates)


def too_slow(facts: Facts) -> Iterator[Finding]:
    first, last = facts.quarter(0), facts.quarter(3)
    if min(len(first), len(last)) < 5 or not np.isfinite(facts.start):
        return
    if not (facts.poor if facts.left is None else facts.left > _SLOW):
        return
    time = facts.time()
    middle = facts.loss[(time > 0.4) & (time < 0.6)]
    middle = middle[np.isfinite(middle)]
    error = np.hypot(first.std() / len(first) ** 0.5, last.std() / len(last) ** 0.5)
    fell = facts.start - facts.end
    if first.mean() - last.mean() < SIGMAS * error or not len(middle) or fell <= 0:
        return
    if "nll" in facts.val and _rise(facts)[0]:  # more of it would not help other images
        return
    share = float(np.mean(middle) - facts.end) / fell
    if share < _LINEAR:
        return
    lr = facts.recipe.optimizer.lr
    rates = [("optimizer.lr", times(lr, 10 if fell < 0.2 * facts.start else 3))]
    turn = choose(facts.recipe, rates)
    yield Finding(
        "problem",
        "Too slow",
        f"The training loss fell from {facts.start:.3f} to {facts.end:.3f}, {share:.0%} of it in "
        "the second half of the sum of learning rates (half would be a straight line): it had not "
        f"come to rest when the run ended.{what_if(facts.history, turn)}",
        "too_slow",
        {"start": facts.start, "end": facts.end, "share": share, "left": facts.left},
        turn,
    )


def plateau(facts: Facts) -> Iterator[Finding]:
    third, fourth = facts.quarter(2), facts.quarter(3)
    if min(len(third), len(fourth)) < 5 or not np.isfinite(facts.start):
        return
    rate = facts.history.train.get("lr", np.zeros(0))
    held = len(rate) > 0 and float(rate[len(rate) // 2 :].min()) >= 0.5 * float(rate.max())
    before, after = float(third.mean()), float(fourth.mean())
    error = np.hypot(third.std() / len(third) ** 0.5, fourth.std() / len(fourth) ** 0.5)
    flat = abs(before - after) < max(_FLAT * before, 2 * error)
    fitted = compared(facts.probe) and facts.probe["train"]["accuracy"] > _FITTED
    stuck = facts.end > 0.95 * facts.start
    if not flat or fitted or not (held or stuck):
        return
    lr = facts.recipe.optimizer.lr
    first: tuple[str, Any]
    if stuck:
        said = f"The training loss has stayed where it started, {facts.start:.3f}"
        factor = 10 if facts.end < 1.02 * facts.start else 0.1
        first = ("optimizer.lr", times(lr, factor))
    else:
        said = (
            f"The training loss stood at {before:.3f} in the third quarter of the run and at "
            f"{after:.3f} in the fourth, with a learning rate of {rate[-1]:.3g} to the last"
        )
        first = ("schedule.name", "cosine")
    turn = choose(facts.recipe, [first, ("optimizer.lr", times(lr, 0.1))])
    yield Finding(
        "problem",
        "Plateau",
        f"{said}. A rate that falls lets it come to rest lower; `bigbatch find-lr` looks for one."
        f"{what_if(facts.history, turn)}",
        "plateau",
        {
            "start": facts.start,
            "third_quarter": before,
            "fourth_quarter": after,
            "lr": float(rate[-1]) if len(rate) else None,
        },
        turn,
    )


def underfitting(facts: Facts) -> Iterator[Finding]:
    if not facts.poor:
        return
    seen = ""
    if facts.left is not None:
        train = facts.probe["train"]
        seen = (
            f"; training images, seen as validation images are, are right by "
            f"{train['accuracy']:.1%} at a loss of {train['nll']:.3f}, {facts.left:.0%} of that of "
            "guessing by the classes' shares"
        )
    yield Finding(
        "problem",
        "Under-fitting",
        f"The training loss only fell from {facts.start:.3f} to {facts.end:.3f}, and has come to "
        f"rest there{seen}. Take a larger network, or regularise and augment less.",
        "underfitting",
        {"start": facts.start, "end": facts.end, "left": facts.left},
        choose(facts.recipe, _looser(facts)),
    )


def _looser(facts: Facts) -> list[tuple[str, Any]]:
    """What holds the network back, strongest first; then a larger network."""
    recipe, own = facts.recipe, facts.recipe.regularise
    decay = getattr(recipe.optimizer, "weight_decay", 0.0)
    found: list[tuple[str, Any]] = []
    if decay * recipe.optimizer.lr >= 0.01 or decay >= 0.1:
        found.append(("optimizer.weight_decay", times(decay, 0.01)))
    for key, rate in recipe.model.options.items():
        if "drop" in key and isinstance(rate, int | float) and rate >= 0.4:
            found.append((f"model.options.{key}", 0.1))
    found += [(f"regularise.{k}", 0.0) for k in ("l1", "l2", "input_noise", "drop_connect")
              if getattr(own, k)]  # fmt: skip
    if recipe.augment.mixup or recipe.augment.cutmix:
        found.append(("augment.mixup" if recipe.augment.mixup else "augment.cutmix", 0.0))
    larger = "resnet50" if recipe.model.name.startswith("resnet18") else "resnet18"
    return [*found, ("model.name", larger)]


def overconfident(facts: Facts) -> Iterator[Finding]:
    rise, said, evidence = _rise(facts)
    accuracy = facts.val["accuracy"]
    if rise:
        yield Finding(
            "note",
            "Over-confident",
            f"{said} Accuracy did not suffer ({accuracy[-1]:.2%}, at best "
            f"{np.nanmax(accuracy):.2%}): the probabilities are too sure. A temperature, as "
            "`bigbatch ensemble` fits one, mends that.",
            "overconfident",
            evidence,
            choose(facts.recipe, [("loss.label_smoothing", 0.1)]),
        )


def improving(facts: Facts) -> Iterator[Finding]:
    accuracy, step = facts.val["accuracy"], facts.val["step"]
    late = step > step[-1] * 0.8  # the last fifth of the run
    gain = 100 * float(np.nanmax(accuracy[late]) - np.nanmax(accuracy[~late]))
    length = facts.recipe.duration
    least = max(0.5, 100 * facts.noise(float(np.nanmax(accuracy))))
    if gain > least and int(np.nanargmax(accuracy)) >= len(accuracy) - 2:
        yield Finding(
            "note",
            "Still improving at the end",
            f"The last fifth of the run raised the best validation accuracy by {gain:.1f} points. "
            "A longer run would probably gain more.",
            "improving",
            {"gain": gain / 100},
            choose(facts.recipe, [("duration", f"{2 * length.value:g} {length.unit}")]),
        )


def converged(facts: Facts) -> Finding:
    accuracy, nll, step = facts.val["accuracy"], facts.val["nll"], facts.val["step"]
    best, late = int(np.nanargmax(accuracy)), step > step[-1] * 0.8
    gain = 100 * float(np.nanmax(accuracy[late]) - np.nanmax(accuracy[~late]))
    rise = float(nll[-1] / np.nanmin(nll) - 1)
    return Finding(
        "good",
        "Converged",
        f"Validation accuracy reached {accuracy[best]:.2%} at step {step[best]:,.0f} and the last "
        f"fifth of the run changed the best by {gain:+.1f} points; validation loss ended "
        f"{f'{rise:.0%} above' if rise >= 0.005 else 'at'} its lowest.",
        "converged",
        {"accuracy": float(accuracy[best]), "step": int(step[best]), "gain": gain / 100},
    )
