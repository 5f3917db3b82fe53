"""What can be known of a run before it starts, on a machine without torch or GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigbatch.configs.load import recipe_hash
from bigbatch.configs.schema import Recipe
from bigbatch.data.index import open_index
from bigbatch.data.order import build_order
from bigbatch.trainers.plan import Plan, check_world, make_plan
from bigbatch.trainers.schedules import build_schedule

_DRAWN_POINTS = 2000


def check(recipe: Recipe, world: int | None) -> dict[str, Any]:
    """Open everything that the recipe names; returns what a run of it will do.

    `world` is the number of ranks to check the recipe against. Raises UserError with the
    remedy for the first thing that would stop the run.
    """
    if world is not None:
        check_world(recipe, world)
    data = recipe.data
    names = [name for name in (data.train, data.val, data.test) if name is not None]
    indexes = {name: open_index(Path(data.path) / name) for name in names}
    train = indexes[data.train]
    order = build_order(data.sampling, train, recipe.seed)
    plan = make_plan(recipe, order.epoch_samples)
    counts = train.class_counts
    return {
        "recipe": recipe.name,
        "hash": recipe_hash(recipe),
        "splits": {
            name: {"samples": len(index), "shards": len(index.shards), "hash": index.hash}
            for name, index in indexes.items()
        },
        "classes": len(train.classes),
        "smallest_class": int(counts.min()),
        "largest_class": int(counts.max()),
        "global_batch": recipe.global_batch,
        "micro_batch": recipe.micro_batch,
        "micro_batches": recipe.micro_batches,
        "world_size": world,
        "epoch_samples": order.epoch_samples,
        "steps": plan.total,
        "epochs": round(plan.total * recipe.global_batch / order.epoch_samples, 4),
        "evaluations": sum(plan.evaluates(step) for step in range(1, plan.total + 1)),
        "checkpoints": sum(plan.saves(step) for step in range(1, plan.total + 1)),
        "snapshots": sorted(plan.snapshots),
        "lr": key_rates(recipe, plan, learning_rate(recipe, plan, order.epoch_samples)),
    }


def epoch_samples(recipe: Recipe) -> int:
    """Samples that the recipe's order puts into one epoch; opens the training index."""
    index = open_index(Path(recipe.data.path) / recipe.data.train)
    return int(build_order(recipe.data.sampling, index, recipe.seed).epoch_samples)


def learning_rate(recipe: Recipe, plan: Plan, samples: int) -> Callable[[int], float]:
    """The learning rate that step s (from 0) is taken with."""
    factor = build_schedule(
        recipe.schedule,
        total_steps=plan.total,
        global_batch=recipe.global_batch,
        epoch_samples=samples,
    )
    return lambda step: recipe.optimizer.lr * factor(step)


def key_rates(recipe: Recipe, plan: Plan, rate: Callable[[int], float]) -> dict[int, float]:
    """The learning rate where it says most: first, last, highest, and around cycle ends."""
    rates = [rate(step) for step in range(plan.total)]
    steps = {0, plan.total - 1, plan.total // 2, rates.index(max(rates))}
    for end in plan.snapshots:
        steps |= {end - 1, end}
    return {step: rates[step] for step in sorted(steps) if 0 <= step < plan.total}


def draw(recipe: Recipe, plan: Plan, rate: Callable[[int], float], path: Path) -> None:
    """Draw the learning rate over the steps into a picture (.png, .svg, .pdf)."""
    from matplotlib.figure import Figure

    stride = max(1, plan.total // _DRAWN_POINTS)
    steps = [*range(0, plan.total, stride), plan.total - 1]
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [rate(step) for step in steps])
    for end in sorted(plan.snapshots):
        axes.axvline(end, color="0.7", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, plan.total), title=recipe.name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
