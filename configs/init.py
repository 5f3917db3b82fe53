"""Initialisation as a recipe writes it; trainers/models/initialise.py draws it. docs/craft.md."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from bigbatch.configs.part import NonNegative, Positive, StrictModel

Distribution = Literal["normal", "uniform"]


class Normal(StrictModel):
    """Gaussian of mean 0."""

    name: Literal["normal"]
    std: Positive = Field(description="standard deviation")


class Uniform(StrictModel):
    """Uniform of mean 0: between -sqrt(3) std and sqrt(3) std."""

    name: Literal["uniform"]
    std: Positive = Field(description="standard deviation")


class TruncatedNormal(StrictModel):
    """Gaussian of mean 0, drawn again beyond two `std`; what is left has 0.88 of it."""

    name: Literal["truncated_normal"]
    std: Positive = Field(description="standard deviation before the cut")


class Xavier(StrictModel):
    """Variance gain^2 * 2 / (fan in + fan out) (Glorot and Bengio 2010, equation 12)."""

    name: Literal["xavier"]
    distribution: Distribution = Field("uniform", description="what values are drawn from")
    gain: Positive = Field(1.0, description="multiplies the standard deviation")


class He(StrictModel):
    """Variance gain^2 / fan, the gain of the nonlinearity (He et al. 2015, arXiv:1502.01852,
    equations 10 and 14)."""

    name: Literal["he"]
    distribution: Distribution = Field("normal", description="what values are drawn from")
    fan: Literal["in", "out"] = Field(
        "out", description="in keeps the size of signals, out that of gradients"
    )
    nonlinearity: Literal["relu", "leaky_relu", "linear", "sigmoid", "tanh", "selu"] = Field(
        "relu", description="what follows the layer; it sets the gain"
    )
    slope: NonNegative = Field(0.0, description="of leaky_relu for negative inputs")


class Orthogonal(StrictModel):
    """Orthonormal rows or columns of the weight as a matrix, times `gain` (Saxe et al. 2014,
    arXiv:1312.6120)."""

    name: Literal["orthogonal"]
    gain: Positive = Field(1.0, description="multiplies the matrix")


Weights = Annotated[
    Normal | Uniform | TruncatedNormal | Xavier | He | Orthogonal, Field(discriminator="name")
]


class Init(StrictModel):
    """Fresh weights; each value follows from the seed and its parameter's name alone."""

    weights: Weights | None = Field(None, description="of convolutions and linear layers")
    bias: float | None = Field(None, description="of convolutions and linear layers: this value")
    zero_gamma: bool = Field(
        False, description="the last norm of each residual block starts at 0 (arXiv:1706.02677)"
    )
    head_prior: bool = Field(
        False,
        description="the classifier's bias starts at what gives each class's share of the training "
        "samples (Lin et al. 2017, arXiv:1708.02002, section 3.3)",
    )


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's initialisation cannot be together with the rest."""
    model, init, loss = recipe.model, recipe.model.init, recipe.loss
    if init is None:
        return
    if model.pretrained or model.checkpoint:
        source = "model.pretrained" if model.pretrained else "model.checkpoint"
        yield f"model.init is for fresh weights, and {source} loads some; leave one of them out"
    if init == Init():
        yield "model.init says nothing; give it weights, bias, zero_gamma or head_prior"
    he = init.weights
    if isinstance(he, He) and he.slope and he.nonlinearity != "leaky_relu":
        yield (
            f"model.init.weights.slope = {he.slope:g} is of leaky_relu, and nonlinearity is "
            f"{he.nonlinearity}; set nonlinearity=leaky_relu, or leave slope out"
        )
    if not init.head_prior:
        return
    if model.head is not None and model.head.name == "cosine":
        yield (
            "model.init.head_prior sets the classifier's bias, and model.head = cosine has none; "
            "leave one of them out"
        )
    if recipe.data.stream is not None:
        yield (
            "model.init.head_prior counts the training samples of each class, and a stream does "
            "not tell them; leave it out, or train from an index"
        )
    if recipe.data.sampling.name != "uniform":
        yield (
            "model.init.head_prior is each class's share of the training samples, and "
            f"data.sampling = {recipe.data.sampling.name} draws other shares; leave one of them out"
        )
    weights = getattr(loss, "class_weights", None)
    if weights is not None and weights.name in ("balanced", "effective_number"):
        yield (
            "model.init.head_prior starts from each class's share of the samples, and "
            f"loss.class_weights = {weights.name} evens the shares out; leave one of them out"
        )
    if loss.name in ("hinge", "ramp"):
        yield (
            f"model.init.head_prior is a logarithm of shares, and loss = {loss.name} takes margins "
            "for logits; leave one of them out"
        )
    if loss.name == "logit_adjusted":
        yield (
            "model.init.head_prior and loss = logit_adjusted count the class prior twice; "
            "leave one of them out"
        )
