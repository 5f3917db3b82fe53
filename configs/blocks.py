"""Parts of a network as a recipe writes them: attention, pooling, activations."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from bigbatch.configs.part import Count, Positive, StrictModel

# torch's activations that are functions of one element, under its own names.
Activation = Literal[
    "CELU",
    "ELU",
    "GELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "PReLU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
]


class Attention(StrictModel):
    """Attention at the end of chosen stages, the first being 1.

    se: Hu et al. 2018, arXiv:1709.01507; cbam: Woo et al. 2018, arXiv:1807.06521; scse: Roy et al.
    2018, arXiv:1803.02579, the sum of both excitations.
    """

    name: Literal["se", "cbam", "scse"]
    stages: Annotated[list[Count], Field(min_length=1)] = Field(
        description="counted from the input, the first being 1"
    )
    reduction: Count = Field(16, description="channels over those between the two layers")


class Average(StrictModel):
    """The mean of each map."""

    name: Literal["average"]


class Maximum(StrictModel):
    """The largest value of each map."""

    name: Literal["maximum"]


class GeneralisedMean(StrictModel):
    """(mean of x^p)^(1/p) of values of at least 1e-6 (Radenovic et al. 2018, arXiv:1711.02512)."""

    name: Literal["generalised_mean"]
    p: Positive = Field(3.0, description="1 is the mean; the larger, the nearer to the maximum")


class Stochastic(StrictModel):
    """One value of each map, drawn in proportion to itself in training; their expectation after it
    (Zeiler and Fergus 2013, arXiv:1301.3557). Values below 0 are never drawn."""

    name: Literal["stochastic"]


Pool = Annotated[Average | Maximum | GeneralisedMean | Stochastic, Field(discriminator="name")]


def refusals(recipe: Any) -> Iterator[str]:
    """What these parts cannot be together with the rest."""
    model = recipe.model
    if model.attention is not None and len(set(model.attention.stages)) < len(
        model.attention.stages
    ):
        yield (
            f"model.attention.stages = {model.attention.stages} names a stage twice; name each once"
        )
    if model.activation and model.norm is not None and model.norm.name == "filter_response":
        yield (
            f"model.norm = filter_response puts its thresholds in the place of ReLUs, and "
            f"model.activation = {model.activation} would, too; leave one of them out"
        )
    if model.pool is not None and "global_pool" in model.options:
        yield (
            f"model.pool = {model.pool.name} and model.options.global_pool both say how maps are "
            "pooled; leave one of them out"
        )
