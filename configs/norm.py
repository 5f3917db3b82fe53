"""Normalisation as a recipe writes it; trainers/models/norm_layers.py computes it."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from bigbatch.configs.part import Count, NonNegative, Positive, StrictModel


class Group(StrictModel):
    """GroupNorm (Wu and He 2018, arXiv:1803.08494): over groups of channels of one image."""

    name: Literal["group"]
    groups: Count = Field(32, description="of channels")


class Layer(StrictModel):
    """LayerNorm over the channels of each pixel, as ConvNeXt has it (arXiv:2201.03545)."""

    name: Literal["layer"]


class Instance(StrictModel):
    """InstanceNorm (Ulyanov et al. 2016, arXiv:1607.08022): each channel of each image alone."""

    name: Literal["instance"]


class FilterResponse(StrictModel):
    """Filter response normalisation with its thresholded unit (Singh and Krishnan 2020,
    arXiv:1911.09737): the TLU takes the place of each ReLU that follows a norm."""

    name: Literal["filter_response"]


class LocalResponse(StrictModel):
    """x / (k + alpha * sum of x^2 over `size` neighbouring channels)^beta (Krizhevsky et al. 2012,
    section 3.3, whose alpha torch would divide by `size`). It has no weights."""

    name: Literal["local_response"]
    size: Count = Field(5, description="channels that are summed over")
    alpha: NonNegative = Field(1e-4, description="weight of the sum of squares")
    beta: NonNegative = Field(0.75, description="exponent")
    k: Positive = Field(2.0, description="added to the sum")


class BatchRenorm(StrictModel):
    """Batch renormalisation (Ioffe 2017, arXiv:1702.03275): the batch's statistics, corrected
    towards the running ones by at most `r_max` and `d_max`."""

    name: Literal["batch_renorm"]
    r_max: Annotated[float, Field(ge=1)] = Field(3.0, description="largest correction of the scale")
    d_max: NonNegative = Field(
        5.0, description="largest correction of the mean, in standard deviations"
    )
    ramp_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="steps over which the limits grow linearly from 1 and 0, plain BatchNorm"
    )


class GhostBatch(StrictModel):
    """BatchNorm over `samples` consecutive images of a micro-batch (Hoffer et al. 2017,
    arXiv:1705.08741)."""

    name: Literal["ghost_batch"]
    samples: Annotated[int, Field(ge=2)] = Field(description="images that are normalised together")


class FrozenBatch(StrictModel):
    """BatchNorm by the statistics of the weights to start from, which stay as they are."""

    name: Literal["frozen_batch"]
    train_affine: bool = Field(False, description="whether its scales and shifts learn")


Norm = Annotated[
    Group
    | Layer
    | Instance
    | FilterResponse
    | LocalResponse
    | BatchRenorm
    | GhostBatch
    | FrozenBatch,
    Field(discriminator="name"),
]


class LinearHead(StrictModel):
    """The model's own linear classifier, after a norm of its input."""

    name: Literal["linear"]
    feature_norm: Literal["layer", "batch", "l2"] = Field(
        description="norm of the classifier's input"
    )
    feature_scale: Positive = Field(
        1.0, description="length of features under l2 (Ranjan et al. 2017, arXiv:1703.09507)"
    )


class CosineHead(StrictModel):
    """`scale` times the cosine of features and class weights, without bias (Gidaris and Komodakis
    2018, arXiv:1804.09458, equation 3)."""

    name: Literal["cosine"]
    scale: Positive = Field(
        16.0, description="what cosines are multiplied by: the inverse of a temperature"
    )
    feature_norm: Literal["layer", "batch"] | None = Field(
        None, description="norm of the classifier's input, before the cosine"
    )


Head = Annotated[LinearHead | CosineHead, Field(discriminator="name")]


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's norms and head cannot be together with the rest."""
    model, norm, head = recipe.model, recipe.model.norm, recipe.model.head
    if isinstance(norm, FrozenBatch) and not (model.pretrained or model.checkpoint):
        yield (
            "model.norm = frozen_batch keeps the statistics of weights to start from, and there "
            "are none; set model.pretrained or model.checkpoint, or take another norm"
        )
    if isinstance(norm, GhostBatch) and recipe.micro_batch % norm.samples:
        yield (
            f"model.norm.samples = {norm.samples} does not divide micro_batch = "
            f"{recipe.micro_batch}, whose images make the ghost batches; choose a divisor"
        )
    if isinstance(norm, BatchRenorm) and norm.r_max == 1 and norm.d_max == 0:
        yield (
            "model.norm = batch_renorm with r_max 1 and d_max 0 is plain BatchNorm; raise them, or "
            "leave model.norm out"
        )
    if isinstance(head, LinearHead) and head.feature_norm != "l2" and head.feature_scale != 1:
        yield (
            f"model.head.feature_scale = {head.feature_scale:g} is the length of features "
            f"under l2, and feature_norm is {head.feature_norm}; leave it out, or take l2"
        )
    if head is not None and recipe.loss.name == "large_margin":
        yield (
            f"loss = {recipe.loss.name} looks at the plain linear classifier, and "
            f"model.head = {head.name} changes it; leave one of them out"
        )
