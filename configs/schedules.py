"""Learning-rate schedules as a recipe writes them; trainers/planning/schedules.py computes them.

Every schedule gives a factor that multiplies `optimizer.lr`. docs/schedules.md draws them.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bigbatch.configs.durations import Duration, Length, Period
from bigbatch.configs.part import Count, Fraction, NonNegative, Positive, StrictModel

_NONE = Length(0, "steps")


class Warmup(StrictModel):
    """Fields shared by all single schedules: a warmup before the decay starts."""

    warmup: Duration = Field(_NONE, description="length of the warmup; the decay follows it")
    warmup_start: Fraction = Field(0.0, description="factor at step 0 of the warmup")
    warmup_shape: Literal["linear", "exponential"] = Field(
        "linear", description="linear: by equal differences; exponential: by equal factors"
    )

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_shape == "exponential" and self.warmup_start == 0:
            raise ValueError(
                "warmup_shape: exponential multiplies warmup_start up to 1, and that is 0; "
                "set warmup_start above 0, such as 0.01"
            )
        return self


class Constant(Warmup):
    """1 throughout, after the warmup."""

    name: Literal["constant"]


class Cosine(Warmup):
    """Half a cosine from 1 to `final` over the steps after the warmup (SGDR, eq. 5)."""

    name: Literal["cosine"]
    final: Fraction = Field(0.0, description="factor that the run ends on")


class Cycles(Warmup):
    """Cosine cycles, each warmed up again, with a snapshot at the end of each (Huang et al.
    2017, eq. 2); `mult` above 1 makes each cycle that many times longer (SGDR's T_mult)."""

    name: Literal["cycles"]
    cycles: Count = Field(3, description="how many; each ends with a snapshot")
    mult: Count = Field(1, description="length of a cycle relative to the one before")
    rewarmup: Duration = Field(_NONE, description="warmup of each cycle after the first")
    final: Fraction = Field(0.0, description="factor that each cycle ends on")


class LinearCosine(Warmup):
    """(alpha + linear decay) x cosine + beta (Bello et al. 2017, appendix); with `noise`,
    normal noise of variance noise / (1 + t)^noise_decay is added to the linear decay."""

    name: Literal["linear_cosine"]
    periods: Positive = Field(0.5, description="cosine periods in the run")
    alpha: NonNegative = Field(0.0, description="added to the linear decay")
    beta: NonNegative = Field(0.001, description="added to the product")
    noise: NonNegative = Field(0.0, description="variance of the noise at step 0")
    noise_decay: NonNegative = Field(0.55, description="exponent by which the variance falls")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="key of the noise")


class Polynomial(Warmup):
    """(1 - final) (1 - t / T)^power + final. T is the rest of the run, or `length`."""

    name: Literal["polynomial"]
    power: Positive = Field(2.0, description="1 is a line")
    final: Fraction = Field(0.0, description="factor that the decay ends on")
    length: Period | None = Field(None, description="steps that the decay takes")
    cycle: bool = Field(
        False, description="at the end of each `length`, go on towards the end of the next one"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cycle and self.length is None:
            raise ValueError("cycle: true needs length, the steps from one restart to the next")
        return self


class Exponential(Warmup):
    """rate^(t / every); with `staircase` in whole steps of `every`."""

    name: Literal["exponential"]
    rate: Fraction = Field(description="factor of one `every`")
    every: Period = Field(description="length in which the factor is `rate`")
    staircase: bool = Field(False, description="fall in whole steps of `every`, not smoothly")


class NaturalExponential(Warmup):
    """exp(-rate t / every); with `staircase` in whole steps of `every`."""

    name: Literal["natural_exponential"]
    rate: NonNegative = Field(description="exponent of one `every`")
    every: Period = Field(description="length in which the factor is exp(-rate)")
    staircase: bool = Field(False, description="fall in whole steps of `every`, not smoothly")


class InverseTime(Warmup):
    """1 / (1 + rate t / every); with `staircase` in whole steps of `every`."""

    name: Literal["inverse_time"]
    rate: NonNegative = Field(description="added to the denominator in one `every`")
    every: Period = Field(description="length in which the factor is 1 / (1 + rate)")
    staircase: bool = Field(False, description="fall in whole steps of `every`, not smoothly")


class Step(Warmup):
    """Times `gamma` after every `every`, counted from the start of the run."""

    name: Literal["step"]
    every: Period = Field(description="length from one fall to the next")
    gamma: Fraction = Field(0.1, description="factor of each fall")


class MultiStep(Warmup):
    """Times `gamma` at each milestone, counted from the start of the run."""

    name: Literal["multi_step"]
    milestones: list[Duration] = Field(min_length=1, description="where the rate falls")
    gamma: Fraction = Field(0.1, description="factor of each fall")


class PiecewiseConstant(Warmup):
    """`values[i]` up to boundary i, the last value after all, from the start of the run."""

    name: Literal["piecewise_constant"]
    boundaries: list[Duration] = Field(min_length=1, description="where the factor changes")
    values: list[NonNegative] = Field(description="the factors, one more than boundaries")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"{len(self.boundaries)} boundaries part the run into {len(self.boundaries) + 1} "
                f"pieces, but there are {len(self.values)} values; give one for each piece"
            )
        return self


class Triangular(Warmup):
    """Up from `low` to 1 in `rise` and down again, on and on (Smith 2017). `halving`: each
    peak is half as high as the one before (triangular2)."""

    name: Literal["triangular"]
    rise: Period = Field(description="length of the way up, and of the way down")
    low: Fraction = Field(0.1, description="factor at the bottom")
    halving: bool = Field(False, description="halve each peak")


class OneCycle(StrictModel):
    """Up to 1, then down over the rest of the run (Smith and Topin 2018; torch's OneCycleLR)."""

    name: Literal["one_cycle"]
    rise: Annotated[float, Field(gt=0, lt=1)] = Field(0.3, description="part of the run going up")
    shape: Literal["cosine", "linear"] = Field("cosine", description="of both ways")
    start: Fraction = Field(0.04, description="factor at step 0")
    final: Fraction = Field(4e-6, description="factor at the last step")


class Plateau(Warmup):
    """Times `factor` when a validation metric stops improving (torch's ReduceLROnPlateau).

    Counts evaluations after the warmup; one that comes after s steps acts on step s.
    """

    name: Literal["plateau"]
    metric: Literal["accuracy", "nll", "mae", "rmse", "r2", "kl", "mode"] = Field(
        "nll", description="of the validation split, one of those that the loss has"
    )
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="of each reduction")
    patience: Annotated[int, Field(ge=0)] = Field(
        10, description="evaluations without improvement that are borne"
    )
    threshold: NonNegative = Field(1e-4, description="smaller improvements are none")
    threshold_mode: Literal["rel", "abs"] = Field(
        "rel", description="rel: of the best so far; abs: of the metric itself"
    )
    cooldown: Annotated[int, Field(ge=0)] = Field(
        0, description="evaluations after a reduction that are not counted"
    )
    final: Fraction = Field(0.0, description="the factor falls no lower")


class Piece(StrictModel):
    """One schedule of a sequence and how long it lasts; the last one lasts to the end."""

    length: Period | None = Field(None, description="how long it lasts; the last one has none")
    schedule: "Schedule" = Field(description="what runs in this piece")


class Sequence(StrictModel):
    """One schedule after another. Each counts its steps from 0 and ends with its piece."""

    name: Literal["sequence"]
    pieces: list[Piece] = Field(min_length=1, description="in order")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for i, piece in enumerate(self.pieces, 1):
            if (piece.length is None) != (i == len(self.pieces)):
                raise ValueError(
                    f"piece {i} of {len(self.pieces)}: every piece but the last has a length, "
                    "the last one lasts to the end of the run"
                )
        return self


class Product(StrictModel):
    """The product of several schedules' factors."""

    name: Literal["product"]
    factors: list["Schedule"] = Field(min_length=1, description="the schedules that are multiplied")


Schedule = Annotated[
    Constant
    | Cosine
    | Cycles
    | LinearCosine
    | Polynomial
    | Exponential
    | NaturalExponential
    | InverseTime
    | Step
    | MultiStep
    | PiecewiseConstant
    | Triangular
    | OneCycle
    | Plateau
    | Sequence
    | Product,
    Field(discriminator="name"),
]


def depends_on_evaluations(config: Schedule) -> bool:
    """Whether the rate depends on what the run measures: such a schedule cannot be drawn."""
    match config:
        case Sequence():
            return any(depends_on_evaluations(piece.schedule) for piece in config.pieces)
        case Product():
            return any(map(depends_on_evaluations, config.factors))
    return isinstance(config, Plateau)


Piece.model_rebuild()
Sequence.model_rebuild()
Product.model_rebuild()
