"""Learning-rate schedules as a recipe writes them; trainers/schedules.py computes them.

Every schedule gives a factor that multiplies `optimizer.lr`.
"""

from typing import Annotated, Literal

from pydantic import Field

from bigbatch.configs.durations import Duration, Length
from bigbatch.configs.part import Count, Fraction, Part

_NONE = Length(0, "steps")


class Warmup(Part):
    """Fields shared by all schedules: a linear warmup before the decay starts."""

    warmup: Duration = Field(_NONE, description="linear warmup, counted before the decay starts")
    warmup_start: Fraction = Field(0.0, description="factor at step 0 of the warmup")


class Constant(Warmup):
    name: Literal["constant"]


class Cosine(Warmup):
    """Half a cosine from 1 to `final` over the steps after the warmup (SGDR, eq. 5)."""

    name: Literal["cosine"]
    final: Fraction = Field(0.0, description="factor that the run ends on")


class Cycles(Warmup):
    """Snapshot-ensemble cosine cycles, each warmed up again (Huang et al. 2017, eq. 2)."""

    name: Literal["cycles"]
    cycles: Count = 3
    rewarmup: Duration = Field(_NONE, description="linear warmup of each cycle after the first")
    final: Fraction = Field(0.0, description="factor that each cycle ends on")


Schedule = Annotated[Constant | Cosine | Cycles, Field(discriminator="name")]
