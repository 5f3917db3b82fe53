"""What can be known of a run before it starts, on a machine without torch or GPU."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.plot_style import MUTED, plot_style
from bigbatch.configs.schedules import depends_on_evaluations
from bigbatch.configs.schema import Recipe
from bigbatch.data.index import verify_index
from bigbatch.data.measured import with_measured
from bigbatch.launcher.estimate import Estimate, look, scores_memory
from bigbatch.trainers.models.weights_file import describe, differences, open_weights
from bigbatch.trainers.planning.environment import check_environment
from bigbatch.trainers.planning.inputs import batches_in_words, fit, open_inputs
from bigbatch.trainers.planning.plan import Plan, check_world, largest_world

Rate = Callable[[int], float]  # the learning rate of the step after s finished ones

_DRAWN_POINTS = 2000
_SEARCHED_STEPS = 1_000_000  # for the highest rate: all of them, in all but the longest runs
_CURVE_POINTS = 60
_BLOCKS = " ▁▂▃▄▅▆▇█"


def fit_rate(recipe: Recipe, epoch_samples: int) -> tuple[Plan, Rate]:
    """The plan of a run, and its learning rate, for an epoch of this many samples."""
    plan, factor = fit(recipe, epoch_samples)
    return plan, lambda step: recipe.optimizer.lr * factor(step)


def check(recipe: Recipe, world: int | None) -> dict[str, Any]:
    """What a run of a recipe will do, in plain values, after opening all it names.

    `world` is a number of ranks to check the recipe against.
    """
    check_environment(os.environ)
    if world is not None:
        check_world(recipe, world)
    inputs = open_inputs(recipe)
    recipe = with_measured(recipe)
    for index in inputs.splits.values():
        verify_index(index)
    weights = look_at_weights(recipe, inputs.outputs)
    plan, rate = fit_rate(recipe, inputs.epoch_samples)
    counted = "train" if recipe.data.stream is None else "val"
    counts = inputs.splits[counted].class_counts
    return {
        "recipe": recipe.name,
        "hash": recipe_hash(recipe),
        "splits": {
            name: {"samples": len(index), "shards": len(index.shards), "hash": index.hash}
            for name, index in inputs.splits.items()
        },
        "classes": len(counts),
        "counted": counted,
        "labels": counts.tolist(),
        "smallest_class": int(counts.min()),
        "largest_class": int(counts.max()),
        "global_batch": recipe.largest_batch,
        "batches": None if isinstance(recipe.global_batch, int) else batches_in_words(plan),
        "micro_batch": recipe.micro_batch,
        "micro_batches": recipe.micro_batches,
        "most_ranks": largest_world(recipe),
        "notes": list(inputs.notes),
        "world_size": world,
        "epoch_samples": inputs.epoch_samples,
        "steps": plan.total,
        "epochs": round(plan.timeline.first(plan.total) / inputs.epoch_samples, 4),
        "evaluations": plan.evaluations(),
        "checkpoints": plan.checkpoints(),
        "snapshots": sorted(plan.snapshots),
        "average": average_in_words(recipe, plan),
        "weights": weights,
        "lr_rule": lr_rule(recipe),
        "lr_depends_on_evaluations": depends_on_evaluations(recipe.schedule),
        "lr": key_rates(plan, rate),
        "lr_curve": [rate(plan.total * i // _CURVE_POINTS) for i in range(_CURVE_POINTS)],
    }


def look_at_weights(recipe: Recipe, classes: Sequence[str]) -> list[str]:
    """What is to be said of model.checkpoint before it is loaded; UserError where it cannot be."""
    if recipe.model.checkpoint is None:
        return []
    there = open_weights(Path(recipe.model.checkpoint))
    if there is None:
        return ["they do not say what they were trained for"]
    return differences(there, describe(recipe, classes)) or ["trained for the same"]


def estimate(recipe: Recipe, folder: Path, lead: int | None = None) -> Estimate:
    """Memory, disk, time to save and wandb for a run in `folder`: takes some seconds."""
    inputs = open_inputs(recipe)
    plan, _ = fit_rate(recipe, inputs.epoch_samples)
    classes = len(inputs.outputs)
    found = look(recipe, plan, inputs.epoch_samples, classes, folder, lead)
    sizes = [len(index) for role, index in inputs.splits.items() if role != "train"]
    scoring = scores_memory(sizes, classes, len(plan.snapshots), recipe.evaluate.batch)
    return replace(found, findings=[*found.findings, scoring])


def spark(values: Sequence[float], width: int = 60) -> str:
    """Values as a line of blocks, at most `width` of them, each the mean of its stretch."""
    count = min(width, len(values))
    ends = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    top = max(means) or 1.0
    return "".join(_BLOCKS[round(max(0.0, mean) / top * (len(_BLOCKS) - 1))] for mean in means)


def lr_rule(recipe: Recipe) -> str | None:
    """What optimizer.scale does to the learning rate, in words; None where it is not set."""
    optimizer = recipe.optimizer
    if optimizer.scale is None:
        return None
    return (
        f"{optimizer.lr:g} at a batch of {optimizer.scale.base_batch:,}, by the "
        f"{optimizer.scale.rule} rule {optimizer.lr * recipe.lr_scale:.6g} at "
        f"{recipe.first_batch:,}"
    )


def average_in_words(recipe: Recipe, plan: Plan) -> str | None:
    """What average of the weights the run keeps; None where it keeps none."""
    if recipe.average is None or plan.average is None:
        return None
    steps, rate = plan.average.steps, plan.average.decay_rate
    line = plan.average.timeline
    of, unit = ("steps", 1) if line is None else ("samples", line.unit)
    half_life = f"; a half-life of {unit * math.log(2) / rate:,.6g} {of}" if rate else ""
    return (
        f"{recipe.average.name} of {len(steps):,} sets of weights, after step {steps[0]:,} to "
        f"{steps[-1]:,}{half_life}"
    )


def key_rates(plan: Plan, rate: Rate) -> dict[int, float]:
    """The learning rate where it says most: first, last, highest, and around cycle ends."""
    searched = range(0, plan.total, max(1, plan.total // _SEARCHED_STEPS))
    steps = {0, plan.total - 1, plan.total // 2, max(searched, key=rate)}
    for end in plan.snapshots:
        steps |= {end - 1, end}
    return {step: rate(step) for step in sorted(steps) if 0 <= step < plan.total}


@plot_style()
def draw(name: str, plan: Plan, rate: Rate, path: Path) -> None:
    """Draw the learning rate over the steps into a picture (.png, .svg, .pdf)."""
    from matplotlib.figure import Figure

    stride = max(1, plan.total // _DRAWN_POINTS)
    steps = [*range(0, plan.total, stride), plan.total - 1]
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [rate(step) for step in steps])
    for end in sorted(plan.snapshots):
        axes.axvline(end, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, plan.total), title=name)
    axes.set_ylim(bottom=0)
    figure.savefig(path)
