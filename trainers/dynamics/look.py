"""A run's recorded samples, opened and looked into. Free of torch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigbatch.configs.decisions import recipe_of
from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_json
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.configs.words import plural
from bigbatch.data.index import Index
from bigbatch.trainers.dynamics.rows import read_rows
from bigbatch.trainers.dynamics.study import Dynamics, study
from bigbatch.trainers.planning.inputs import open_order, open_split
from bigbatch.trainers.recovery.stored import STATE, list_checkpoints

# Of each sample, as it is written and printed.
COLUMNS = (
    "visits",
    "margin",
    "confidence",
    "variability",
    "right",
    "forgotten",
    "learned",
    "loss",
)


@dataclass(frozen=True)
class Looked:
    """What a run has recorded of its samples up to a step."""

    run: RunDir
    recipe: Recipe
    index: Index  # of the split that it trains on
    keys: list[str]
    steps: int
    found: Dynamics
    notes: tuple[str, ...]  # what a user should know of these figures
    clean: tuple[int, ...] = ()  # of clean views: the steps whose weights looked at all of them

    def rows(self, samples: np.ndarray) -> list[dict[str, Any]]:
        """Key, class and figures of some samples, as plain values."""
        index, found = self.index, self.found
        return [
            {"key": self.keys[i], "class": index.classes[int(index.label[i])]}
            | {name: getattr(found, name)[i].item() for name in COLUMNS}
            for i in samples.tolist()
        ]

    def summary(self, top: int) -> dict[str, Any]:
        """All that is printed, as plain values: the first `top` of the ranking in it."""
        found, index = self.found, self.index
        below = np.flatnonzero(found.seen & (found.margin < 0))
        by_class = Counter(index.label[below].tolist())
        return {
            "run": str(self.run.path),
            "steps": self.steps,
            "clean": list(self.clean),
            "samples": len(index),
            "seen": int(found.seen.sum()),
            "visits": int(found.visits.sum()),
            "unrecorded": found.unrecorded,
            "not_finite": found.not_finite,
            "no_update": found.no_update,
            "unforgettable": int(found.unforgettable.sum()),
            "forgotten": int((found.forgotten > 0).sum()),
            "never_learned": int(found.never_learned.sum()),
            "margin_below_0": len(below),
            "classes": [
                {
                    "class": index.classes[label],
                    "samples": int(index.class_counts[label]),
                    "margin_below_0": count,
                }
                for label, count in by_class.most_common()
            ],
            "label_errors": self.rows(found.ranking()[:top]),
            "notes": list(self.notes),
        }


def look(run: RunDir, until: int | None = None) -> Looked:
    """What `run` has recorded of its samples, up to `until` finished steps.

    Raises UserError where it has recorded none, or trains on other data by now.
    """
    recipe = recipe_of(run)
    if not run.samples.is_file():
        raise UserError(
            f"{run.path} has no record of its samples: log.samples was false. Train a new run with "
            "log.samples=true, or go on with this one by "
            f"`bigbatch resume {run.path} log.samples=true`, which records from there on"
        )
    index = open_split(recipe.data, recipe.data.train)
    order = open_order(recipe, index)
    check_order(run, order.hash)
    line = recipe.timeline(order.epoch_samples)
    rows = read_rows(run.samples)
    steps = line.reaching(len(rows))
    steps -= line.first(steps) > len(rows)
    if until is not None and until > steps:
        raise UserError(f"--until {until}: {run.name} has recorded its samples up to step {steps}")
    steps = until or steps
    found = study(rows[: line.first(steps)], order.samples, len(index))
    if not found.seen.any():
        raise UserError(
            f"{run.samples} holds no visit of a sample yet: {found.positions:,} positions, "
            f"{found.unrecorded:,} of them not recorded; let the run go on"
        )
    return Looked(run, recipe, index, index.keys(), steps, found, tuple(_notes(recipe, found)))


def check_order(run: RunDir, here: str) -> None:
    """Raise UserError where positions lead to other samples than they did in the run."""
    for path in list_checkpoints(run.checkpoints):
        content = read_json(path / STATE)
        if content is None:
            continue
        there = content.get("fingerprint", {}).get("order_hash")
        if there != here:
            raise UserError(
                f"{run.name} was trained on other data: its order_hash is {there}, that of the "
                f"training split here {here}; put the same shards and index back"
            )
        return


def _notes(recipe: Recipe, found: Dynamics) -> Iterator[str]:
    augment = recipe.augment
    mixed = [f"augment.{k}" for k in ("mixup", "cutmix") if getattr(augment, k) > 0]
    if mixed:
        off = " ".join(f"{key}=0" for key in mixed)
        yield (
            f"{' and '.join(mixed)} mixed each image with another one: loss, margin and p(true) "
            "are of mixtures, and a low margin may be the partner's. Rankings are weaker so; "
            f"--clean looks at single images by weights that were kept, or train with {off}"
        )
    if recipe.distill is not None:
        yield "loss is the part of the labels alone, without the teacher's"
    if found.no_update:
        yield (
            f"{plural(found.no_update, 'visit')} in steps that made no update (stepped over after "
            "a rollback, or overflown in fp16) are left out"
        )
    if found.not_finite:
        yield f"{plural(found.not_finite, 'visit')} with values that are not finite are left out"
    if found.unrecorded:
        yield (
            f"{found.unrecorded:,} of {found.positions:,} positions have no record: log.samples "
            "was false then, or the sample could not be read and another one took its place"
        )
    if (mean := found.visits.sum() / max(1, found.seen.sum())) < 3:
        yield (
            f"{mean:.1f} visits a sample are few: forgetting and variability need several, and "
            "margins of a network that has hardly learned say little"
        )


def in_words(summary: dict[str, Any]) -> list[str]:
    """The figures as sentences."""
    seen = summary["seen"]

    def of_seen(name: str) -> str:
        return f"{summary[name]:,} ({summary[name] / seen:.1%})"

    samples = plural(summary["samples"], "sample")
    visits = f"{plural(summary['visits'], 'visit')} of {seen:,} of {samples}"
    by_step = ", ".join(f"{step:,}" for step in summary["clean"])
    lines = [
        f"clean views of {seen:,} of {samples}, by the weights after step {by_step}"
        if summary["clean"]
        else f"{visits}, {summary['visits'] / seen:.1f} each, up to step {summary['steps']:,}",
        f"unforgettable, learned and never wrong again: {of_seen('unforgettable')}; forgotten at "
        f"least once: {of_seen('forgotten')}; never learned: {of_seen('never_learned')}",
        f"on the average another class had the larger logit: {of_seen('margin_below_0')}",
    ]
    return lines + [f"note: {note}" for note in summary["notes"]]
