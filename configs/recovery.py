"""What a run keeps, and what it does about a step that goes wrong; trainers/recovery does it."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from bigbatch.configs.durations import Length, Period
from bigbatch.configs.part import Count, Positive, StrictModel


class Checkpoint(StrictModel):
    """When a run is saved, and which checkpoints stay."""

    every: Period = Field(Length(1, "epochs"), description="and at the run's end")
    keep: Count = Field(2, description="how many of the newest checkpoints stay on disk")
    keep_best: Annotated[int, Field(ge=0)] = Field(
        0, description="and how many of those with the best score on the validation split"
    )
    keep_every: Period | None = Field(
        None, description="and one each time this much is done, for good"
    )


class Spike(StrictModel):
    """What counts as a leap of the loss: both the factor and the deviations are exceeded."""

    factor: Annotated[float, Field(gt=1)] = Field(
        2.0, description="multiple of the median of the last losses"
    )
    deviations: Positive = Field(8.0, description="robust standard deviations above the median")
    window: Annotated[int, Field(ge=5)] = Field(50, description="how many last losses are taken")


class Corruption(StrictModel):
    """How silent data corruption is looked for, of which no error tells. Found, it ends the run.

    Dixit et al. 2021, "Silent data corruptions at scale" (arXiv:2102.11245).
    """

    digest_every: Count | Literal["ledger"] | None = Field(
        "ledger",
        description="steps between comparisons of what every rank has a copy of, by digests; "
        "ledger: where the ledger digests it anyway, in steps that have a line; null: none",
    )
    recompute_every: Count | None = Field(
        None,
        description="steps between those in which each rank also computes a micro-batch of the "
        "next rank, and their gradients are compared bit for bit; null: none",
    )


class Recovery(StrictModel):
    """What a run does about a step that goes wrong."""

    spike: Spike | None = Field(None, description="also go back from a finite loss that leaps")
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(
        0,
        description="how often the run goes back to a checkpoint from before a bad step and "
        "steps over it; 0: a step that is not finite ends the run",
    )
    skip_steps: Count = Field(
        10, description="how many steps, up to the bad one, then make no update"
    )
    stall_s: Positive = Field(
        300.0,
        description="seconds without progress after which a step counts as hung; or 20 times "
        "the longest wait so far, if that is more",
    )
    corruption: Corruption = Field(
        Corruption(), description="how silent data corruption is looked for"
    )


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's recovery lacks to do what it says."""
    if recipe.recovery.spike and not recipe.recovery.max_rollbacks:
        yield (
            "recovery.spike is set, but recovery.max_rollbacks is 0: set it to how often the "
            "run may go back, such as 3"
        )
