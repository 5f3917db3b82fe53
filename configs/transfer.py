"""What learns of a network that starts from trained weights, when, and at which rate.

trainers/optim/stages.py finds stages and rates, trainers/engine/freezing.py freezes.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bigbatch.configs.durations import Period
from bigbatch.configs.part import Count, Positive, Share, StrictModel

Layer = Annotated[str, Field(min_length=1)]

ULMFIT = 1 / 2.6  # stage_decay as Howard and Ruder have it


class _Rates(StrictModel):
    stage_decay: Share = Field(
        1.0,
        description="the rate falls by this factor from each stage to the one below; ULMFiT's is "
        "1 / 2.6 = 0.385 (Howard and Ruder 2018, arXiv:1801.06146, section 3.2)",
    )
    rates: dict[Layer, Positive] = Field(
        default_factory=dict,
        description="a factor of the rate by stage or layer: a stage's name, a layer's path with * "
        "for any one name in it, for all below it, or type:Conv2d; where several fit, the last "
        "one counts",
    )


class Head(StrictModel):
    """The classifier alone learns: a linear probe."""

    name: Literal["head"]


class All(_Rates):
    """Everything learns from the start: fine-tuning."""

    name: Literal["all"]


class Frozen(_Rates):
    """Some of the network stays as it is: its weights, statistics of BatchNorm, no dropout."""

    name: Literal["frozen"]
    stages: Count | None = Field(None, description="so many of the lowest stages")
    layers: list[Layer] = Field(
        default_factory=list, description="stages or layers, named as in `rates`"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stages is None and not self.layers:
            raise ValueError("nothing is frozen; give stages: K or layers: [...], or take all")
        return self


class Gradual(_Rates):
    """The classifier learns first, then one stage more from the top in each period.

    Howard and Ruder 2018, arXiv:1801.06146, section 3.3.
    """

    name: Literal["gradual"]
    every: Period = Field(description="training after which the next stage learns too")
    stages: Annotated[int, Field(ge=0)] = Field(
        0, description="so many of the lowest stages never learn"
    )


Transfer = Annotated[Head | All | Frozen | Gradual, Field(discriminator="name")]


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's transfer cannot stand beside."""
    own, model, optimizer = recipe.transfer, recipe.model, recipe.optimizer
    if own is None:
        return
    if own.name != "all" and not (model.pretrained or model.checkpoint):
        yield (
            f"transfer = {own.name} freezes weights to start from, and there are none: they would "
            "be random; set model.pretrained or model.checkpoint, or leave transfer out"
        )
    decay, rates = getattr(own, "stage_decay", 1.0), getattr(own, "rates", {})
    if own.name == "all" and decay == 1.0 and not rates:
        yield (
            "transfer = all without stage_decay and rates says nothing: everything learns at one "
            "rate anyway; leave transfer out, or give one of them"
        )
    if decay != 1.0 and optimizer.layer_decay != 1.0:
        yield (
            f"transfer.stage_decay = {decay:g} and optimizer.layer_decay = "
            f"{optimizer.layer_decay:g} both lower the rate from the top down; set one of them to 1"
        )
    if own.name == "gradual" and optimizer.name == "muon" and recipe.backend != "ddp":
        yield (
            f"transfer = gradual leaves layers out of muon's steps, which on {recipe.backend} it "
            "puts together from all ranks' pieces; set backend to ddp, or take another optimizer"
        )
    if optimizer.name == "lbfgs" and (own.name == "gradual" or decay != 1.0 or rates):
        yield (
            f"transfer = {own.name} gives parts of the network other rates or times, and lbfgs has "
            "one for all of it; take transfer head, or frozen without rates, or another optimizer"
        )
