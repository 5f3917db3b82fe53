"""Gradient clipping as a recipe writes it; trainers/optim/clip.py does it."""

from typing import Annotated, Literal

from pydantic import Field

from bigbatch.configs.part import Positive, StrictModel


class ClipNorm(StrictModel):
    """The whole gradient is scaled down to a global L2 norm of at most `limit`."""

    name: Literal["norm"]
    limit: Positive = Field(description="largest L2 norm of the whole gradient")


class ClipValue(StrictModel):
    """Each element is kept within [-limit, limit]."""

    name: Literal["value"]
    limit: Positive = Field(description="largest absolute value of an element")


class ClipAdaptive(StrictModel):
    """Each unit's gradient norm is at most `limit` times its weight's (Brock et al. 2021)."""

    name: Literal["adaptive"]
    limit: Positive = Field(0.01, description="largest ratio of gradient norm to weight norm")
    eps: Positive = Field(1e-3, description="weight norms below this count as this")


Clip = Annotated[ClipNorm | ClipValue | ClipAdaptive, Field(discriminator="name")]
