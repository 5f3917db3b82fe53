"""What the learning curves of a run say, in words. Free of torch.

Rules of thumb with their figures in the text, so that a reader can disagree with them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bigbatch.trainers.monitoring.history import Columns, History, smooth


@dataclass(frozen=True)
class Finding:
    """One observation: `good`, `note` (worth knowing) or `problem` (worth acting on)."""

    level: Literal["good", "note", "problem"]
    title: str
    text: str


def diagnose(history: History) -> list[Finding]:
    """Findings from the curves, problems first; says so where there is too little to judge."""
    train = history.train
    if len(train.get("step", ())) < 20:
        early = Finding("note", "Too early to tell", "Fewer than 20 training steps are recorded.")
        return [*_data(history), early]
    found = [
        *_data(history),
        *_stability(history),
        *_fit(history),
        *_speed(train),
        *_combination(history),
    ]
    order = ("problem", "note", "good")
    return sorted(found, key=lambda finding: order.index(finding.level))


def _data(history: History) -> Iterator[Finding]:
    bad = history.bad_samples
    if bad:
        reason = next(iter(bad["reasons"]))
        yield Finding(
            "problem",
            "Unreadable samples",
            f"{bad['samples']:,} samples in {len(bad['shards']):,} shards could not be read, most "
            f"often because: {reason}. `bigbatch inspect --journal {history.name}` lists each "
            "with its shard, its byte and what took its place.",
        )


def _stability(history: History) -> Iterator[Finding]:
    loss = history.train.get("loss", np.full(len(history.train["step"]), np.nan))
    skipped = sum(e["kind"] == "non_finite" for e in history.events) or int(np.isnan(loss).sum())
    if skipped:
        yield Finding(
            "problem",
            "Non-finite loss, gradient or statistics",
            f"{skipped} steps had a loss, gradient or running statistics that were not finite; "
            "their updates were not applied. Lower optimizer.lr, lengthen the warmup or set clip.",
        )
    if np.isnan(loss).all():
        return
    path = smooth(loss)
    start, lowest, end = path[min(4, len(path) - 1)], float(np.nanmin(path)), path[-1]
    if lowest < 0.7 * start and end > 0.95 * start:
        yield Finding(
            "problem",
            "Diverged",
            f"The training loss fell from {start:.3f} to {lowest:.3f} and is back at {end:.3f}. "
            "Lower optimizer.lr or lengthen the warmup.",
        )


def _fit(history: History) -> Iterator[Finding]:
    train, val = history.train, history.evals.get("val", {})
    total = history.total_steps
    if total and history.last_step < total:
        # Before the learning rate has come down, and just after a restart, curves mislead.
        text = f"{history.last_step:,} of {total:,} steps are done; the fit is judged at the end."
        yield Finding("note", "Not at the end yet", text)
        return
    if len(val.get("step", ())) < 4 or not {"accuracy", "nll"} <= val.keys() or "loss" not in train:
        yield Finding("note", "No verdict on the fit", "Fewer than 4 evaluations are recorded.")
        return
    accuracy, nll, step = val["accuracy"], val["nll"], val["step"]
    path = smooth(train["loss"])
    best = int(np.nanargmax(accuracy))
    low = int(np.nanargmin(nll))
    late = step > step[-1] * 0.8  # the last fifth of the run so far

    rise = nll[-1] / nll[low] - 1
    train_fell = _at(train, path, step[-1]) < _at(train, path, step[low])
    gain = 100 * (np.nanmax(accuracy[late]) - np.nanmax(accuracy[~late]))
    if rise > 0.15 and train_fell:
        yield Finding(
            "problem",
            "Over-fitting",
            f"Validation loss was lowest at step {step[low]:,.0f} ({nll[low]:.3f}) and has risen "
            f"by {rise:.0%} since, while the training loss fell on. Train for less long, or add "
            "augmentation, mixup or weight decay.",
        )
    elif path[-1] > 0.6 * path[min(4, len(path) - 1)]:
        yield Finding(
            "problem",
            "Under-fitting",
            f"The training loss only fell from {path[min(4, len(path) - 1)]:.3f} to "
            f"{path[-1]:.3f}. Raise optimizer.lr or model capacity, or weaken the augmentation.",
        )
    elif gain > 0.5 and best >= len(accuracy) - 2:
        yield Finding(
            "note",
            "Still improving at the end",
            f"The last fifth of the run raised the best validation accuracy by {gain:.1f} "
            "points. A longer run would probably gain more.",
        )
    else:
        yield Finding(
            "good",
            "Converged",
            f"Validation accuracy reached {accuracy[best]:.2%} at step {step[best]:,.0f} and the "
            f"last fifth of the run changed the best by {gain:+.1f} points; validation loss ended "
            f"{f'{rise:.0%} above' if rise >= 0.005 else 'at'} its lowest.",
        )


def _speed(train: Columns) -> Iterator[Finding]:
    if "data_s" not in train or "step_s" not in train:
        return
    # The first steps wait for the first batches, which says nothing about the rest.
    data, total = np.nansum(train["data_s"][5:]), np.nansum(train["step_s"][5:])
    share = data / total if total else 0.0
    if share > 0.2:
        yield Finding(
            "problem",
            "Waiting for data",
            f"{share:.0%} of the step time went into waiting for the loader. Raise data.workers, "
            "or pre-size the images with `bigbatch shard --short-side`.",
        )
    else:
        yield Finding("good", "Data keeps up", f"{share:.1%} of the step time waited for data.")


def _combination(history: History) -> Iterator[Finding]:
    summary: Mapping[str, Any] = history.summary or {}
    split = "test" if summary.get("test") else "val"
    figures = summary.get(split) or {}
    members, ensemble = figures.get("members") or [], figures.get("ensemble")
    if len(members) < 2 or not ensemble:
        return
    best = max(m["accuracy"] for m in members)
    gain = 100 * (ensemble["accuracy"] - best)
    text = (
        f"Mean probability of the kept members scores {ensemble['accuracy']:.2%} on {split}, "
        f"{gain:+.2f} points against the best single member"
    )
    losses = [m["nll"] for m in members if m["nll"] is not None]  # null: it was not finite
    if losses and ensemble["nll"] is not None:
        text += f"; NLL {ensemble['nll']:.4f} against {min(losses):.4f}"
    text += "."
    # The binomial standard error: on a few hundred images one image more or less is noise.
    table = history.confusion or {}
    count = int(np.sum(table.get("matrix", 0))) if table.get("split") == split else 0
    error = 100 * float(np.sqrt(best * (1 - best) / count)) if count else 0.0
    if error:
        text += f" On {count:,} images one standard error is {error:.2f} points."
    if abs(gain) < 2 * error:
        yield Finding("note", "The ensemble makes no clear difference", text)
    elif gain > 0:
        yield Finding("good", "The ensemble helps", text)
    else:
        yield Finding("note", "The ensemble does not help", text)


def _at(train: Columns, path: NDArray[np.float64], step: float) -> float:
    """The smoothed training loss at the recorded step nearest below `step`."""
    return float(path[max(0, int(np.searchsorted(train["step"], step, side="right")) - 1)])
