"""What each micro-batch reads, computed from the recipe alone: for looking and for checks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bigbatch.configs.errors import UserError
from bigbatch.configs.schema import Recipe
from bigbatch.trainers.planning.inputs import open_inputs
from bigbatch.trainers.planning.plan import check_world


@dataclass(frozen=True)
class Batch:
    """One micro-batch: for each of its samples the number, key, label and epoch."""

    step: int
    micro: int
    rank: int
    samples: list[int]
    keys: list[str]
    labels: list[int]
    epochs: list[int]


def parse_steps(text: str) -> range:
    """Read A:B, the steps from A up to but not including B, or A alone."""
    first, colon, last = text.partition(":")
    if not first.isdecimal() or (colon and not last.isdecimal()):
        raise UserError(f"--steps {text!r} is not A:B, such as 0:10 for the first ten steps")
    start = int(first)
    stop = int(last) if colon else start + 1
    if stop <= start:
        raise UserError(f"--steps {text!r} holds no step; A must be below B")
    return range(start, stop)


def batches(
    recipe: Recipe, steps: range, world: int = 1, rank: int | None = None
) -> Iterator[Batch]:
    """The micro-batches of `steps` in order; with `rank`, those of one of `world` ranks."""
    check_world(recipe, world)
    if rank is not None and not 0 <= rank < world:
        raise UserError(f"--rank {rank} must be from 0 to {world - 1} at --world-size {world}")
    if steps.stop * recipe.largest_batch >= 1 << 63:
        raise UserError(
            f"--steps up to {steps.stop} at global_batch {recipe.largest_batch} is beyond position "
            "2^63; give earlier steps"
        )
    inputs = open_inputs(recipe)
    order, plan = inputs.order, inputs.plan
    if order is None:
        raise UserError(
            f"recipe {recipe.name} trains on data.stream: which samples come is known only when "
            "they have come; index the tars and set data.path"
        )
    if plan.decide_every is not None and steps.stop > (known := plan.first_decision):
        raise UserError(
            f"--steps up to {steps.stop}: what a step holds from {known} on is decided while "
            f"training (global_batch noise_scale); give steps before {known}"
        )
    index = order.index
    keys = index.keys()

    def batch(step: int, micro: int) -> Batch:
        start = plan.timeline.first(step) + micro * recipe.micro_batch
        positions = np.arange(start, start + recipe.micro_batch)
        samples = order.samples(positions)
        return Batch(
            step=step,
            micro=micro,
            rank=micro % world,
            samples=samples.tolist(),
            keys=[keys[i] for i in samples],
            labels=index.label[samples].tolist(),
            epochs=order.epochs(positions).tolist(),
        )

    first, stride = (0, 1) if rank is None else (rank, world)
    return (
        batch(step, micro)
        for step in steps
        for micro in range(first, plan.micro_batches(step), stride)
    )
