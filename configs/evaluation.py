"""When and how a run measures itself; trainers/evaluation does it."""

from typing import Annotated

from pydantic import Field

from bigbatch.configs.durations import Length, Period
from bigbatch.configs.part import Count, StrictModel


class Evaluate(StrictModel):
    every: Period = Field(Length(1, "epochs"), description="and at the run's end")
    batch: Count = Field(256, description="images per evaluation batch, on each rank")
    crop_fraction: Annotated[float, Field(ge=0.1, le=1)] = Field(
        1.0, description="share of the image's short side in the centre crop"
    )
