"""What keeps a model from learning its samples by heart, as a recipe writes it. docs/craft.md."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from bigbatch.configs.part import Count, NonNegative, Positive, StrictModel

Rate = Annotated[float, Field(ge=0, lt=1)]


class SAM(StrictModel):
    """Sharpness-aware minimisation: the gradient at the worst weights within `rho`.

    Foret et al. 2021, equations 2 and 3, of each micro-batch alone (their m-sharpness).
    """

    name: Literal["sam"]
    rho: Positive = Field(0.05, description="length of the step uphill")


class ASAM(StrictModel):
    """The same, by distances relative to the weights (Kwon et al. 2021, equations 7 and 8)."""

    name: Literal["asam"]
    rho: Positive = Field(0.5, description="length of the step uphill, in units of the weights")
    eta: NonNegative = Field(0.01, description="added to each |weight|")


class EarlyStop(StrictModel):
    """The end of training where the validation split's score no longer improves.

    The run's model is then that of its best evaluation (Prechelt 1998, "Early stopping - but
    when?", criterion UP).
    """

    patience: Count = Field(description="evaluations in a row without a new best that end it")
    threshold: NonNegative = Field(
        0.0, description="a new best is better by more than this, in the score's own unit"
    )


class Regularise(StrictModel):
    """Off, part by part, by default."""

    l1: NonNegative = Field(0.0, description="times the sum of |w|, in the loss")
    l2: NonNegative = Field(0.0, description="times half the sum of w^2, in the loss")
    max_norm: Positive | None = Field(
        None, description="largest L2 norm of a neuron's or an output channel's weights"
    )
    drop_connect: Rate = Field(0.0, description="share of the classifier's weights that drop out")
    input_noise: NonNegative = Field(
        0.0, description="standard deviation of Gaussian noise on the classifier's input"
    )
    sharpness: Annotated[SAM | ASAM, Field(discriminator="name")] | None = Field(
        None, description="gradients at the sharpest point nearby: sam or asam"
    )
    early_stop: EarlyStop | None = Field(
        None, description="end where the validation split no longer improves"
    )


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's regularisation cannot stand beside."""
    own, optimizer, backend = recipe.regularise, recipe.optimizer, recipe.backend
    by_layer = getattr(optimizer, "weight_decay_of", {}).values()
    of_rest = getattr(getattr(optimizer, "rest", None), "weight_decay", 0.0)
    decay = max(getattr(optimizer, "weight_decay", 0.0), of_rest, *by_layer, 0.0)
    if own.l2 and decay:
        yield (
            f"regularise.l2 = {own.l2:g} and a decay of {decay:g} (optimizer.weight_decay, "
            "weight_decay_of) shrink the same weights; set one of them to 0"
        )
    if (own.l1 or own.l2) and backend == "fsdp2":
        yield (
            "regularise.l1 and l2 add up whole weights, which backend: fsdp2 holds in rows; use "
            "optimizer.weight_decay, or set backend to ddp or zero2"
        )
    for key, what in (("max_norm", "whole neurons"), ("sharpness", "whole gradients")):
        if getattr(own, key) is None:
            continue
        if backend != "ddp":
            yield (
                f"regularise.{key} needs {what}, which backend: {backend} cuts apart; set backend "
                "to ddp"
            )
        if optimizer.name == "lbfgs":
            yield (
                f"regularise.{key} changes weights between the passes that lbfgs compares; choose "
                "another optimizer"
            )
    if own.sharpness is not None and recipe.precision == "fp16":
        yield (
            "regularise.sharpness takes gradients without a loss scale, which fp16 needs; set "
            "precision to bf16 or fp32"
        )
    if own.early_stop is not None:
        if recipe.checkpoint.keep_best == 0:
            yield (
                "regularise.early_stop goes back to the best checkpoint, and checkpoint.keep_best "
                "= 0 keeps none; set it to 1"
            )
        if recipe.schedule.name == "cycles":
            yield (
                "regularise.early_stop keeps the weights of one evaluation, and schedule cycles "
                "those of each cycle; drop early_stop, or choose another schedule"
            )
    if own.drop_connect and recipe.model.head is not None:
        yield (
            f"regularise.drop_connect hides weights of a plain linear classifier, and model.head = "
            f"{recipe.model.head.name} is another one; set it to 0, or leave model.head out"
        )
    if own.drop_connect and recipe.loss.name == "large_margin":
        yield (
            "loss large_margin measures the classifier's weights, and regularise.drop_connect "
            "hides some of them; set it to 0"
        )
