"""What follows a run's own training, as a recipe writes it; launcher/phases.py does it."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from bigbatch.configs.batch import ByNoise
from bigbatch.configs.durations import Period
from bigbatch.configs.part import Count, Positive, StrictModel
from bigbatch.configs.schedules import Cosine, Schedule, depends_on_evaluations
from bigbatch.configs.targets import learns_targets

_MOST = 64  # of workers


class Swap(StrictModel):
    """The recipe is a trunk: workers go on from its end, each alone at a small batch and in an
    order of its own, and their weights are averaged (SWAP; Gupta et al. 2020, arXiv:2001.02312).
    """

    name: Literal["swap"]
    workers: Annotated[int, Field(ge=2, le=_MOST)] = Field(
        description="how many; their seeds are seed, seed + 1, ..."
    )
    duration: Period = Field(description="of each worker, counted from the trunk's end")
    global_batch: Count = Field(description="samples in one optimizer step of a worker")
    micro_batch: Count | None = Field(None, description="of workers; null: that of the trunk")
    lr: Positive | None = Field(
        None, description="optimizer.lr of workers; null: that of the trunk"
    )
    schedule: Schedule = Field(
        Cosine(name="cosine"), description="multiplies their rate, over `duration` alone"
    )


def refusals(recipe: Any) -> Iterator[str]:
    """What a trunk and its workers cannot be, or not have."""
    own = recipe.phases
    if own is None:
        return
    micro = own.micro_batch or recipe.micro_batch
    if own.global_batch % micro:
        yield (
            f"phases.global_batch {own.global_batch} is not a multiple of the workers' micro_batch "
            f"{micro}; choose another one, or set phases.micro_batch"
        )
    if isinstance(recipe.global_batch, ByNoise):
        yield (
            "phases begin at a step that is known ahead, and a batch that noise_scale decides on "
            "leaves it open; set global_batch to a number or stages, or leave phases out"
        )
    if depends_on_evaluations(own.schedule):
        yield (
            "phases.schedule cannot hold a plateau: it counts evaluations of the whole run, most "
            "of which are the trunk's; choose another one"
        )
    if recipe.regularise.early_stop is not None:
        yield (
            "regularise.early_stop goes back to the best evaluation, and phases go on from the "
            "last step; set one of them to null"
        )
    if getattr(recipe.optimizer, "momentum_schedule", None) is not None:
        yield (
            "optimizer.momentum_schedule is of a whole run, and a worker's is longer than its "
            "trunk; set it to null, or leave phases out and branch off by `bigbatch fork`"
        )
    if learns_targets(recipe):
        yield (
            f"loss {recipe.loss.name} learns targets, and the average of phases is judged by "
            "classes; leave phases out and branch off by `bigbatch fork`"
        )
