"""Sampling policies as a recipe writes them; data/order.py computes them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from bigbatch.configs.part import Part


class Uniform(Part):
    """Every sample once an epoch, in a fresh order."""

    name: Literal["uniform"] = "uniform"


class Balanced(Part):
    """Every class equally often an epoch; an epoch has as many samples as the data set."""

    name: Literal["balanced"]


def _from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Sampling = Annotated[
    Annotated[Uniform | Balanced, Field(discriminator="name")], BeforeValidator(_from_name)
]
