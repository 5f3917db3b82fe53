"""The loss as a recipe writes it; trainers/losses builds it."""

from typing import Annotated, Literal

from pydantic import Field

from bigbatch.configs.part import StrictModel


class Loss(StrictModel):
    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
