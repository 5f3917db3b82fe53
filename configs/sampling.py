"""Sampling policies as a recipe writes them; data/order.py computes them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from bigbatch.configs.part import Fraction, StrictModel


class Uniform(StrictModel):
    """Every sample once an epoch, in a fresh order."""

    name: Literal["uniform"] = "uniform"


class Balanced(StrictModel):
    """Every class equally often an epoch; an epoch has as many samples as the data set."""

    name: Literal["balanced"]


class Tempered(StrictModel):
    """Classes in proportion to (their number of samples) ** alpha (Kang et al. 2020, eq. 1)."""

    name: Literal["tempered"]
    alpha: Fraction = Field(0.5, description="1 is the data's own balance, 0 is balanced")


class Progressive(StrictModel):
    """From the data's own balance to equal classes, linearly (Kang et al. 2020, eq. 3)."""

    name: Literal["progressive"]
    epochs: Annotated[int, Field(ge=2)] = Field(
        description="the first epoch has the data's balance; this one, and all later, equal classes"
    )


class LabelShuffling(StrictModel):
    """Every class as often as the largest one has samples; an epoch grows accordingly.

    Also called class reorganisation (Hikvision's entry to ILSVRC 2016, scene classification).
    """

    name: Literal["label_shuffling"]


class RepeatFactor(StrictModel):
    """Samples of a class with share f of the data max(1, sqrt(threshold / f)) times an epoch.

    Gupta et al. 2019, "LVIS", section 4.2; for one label an image.
    """

    name: Literal["repeat_factor"]
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        description="share of the data below which a class is repeated"
    )


class EasyEnsemble(StrictModel):
    """One ensemble member's subset: of each class about as much as the smallest class has.

    The members' subsets of a class do not overlap until its samples are used up (Liu et al.
    2009, "Exploratory undersampling", draws them independently).
    """

    name: Literal["easy_ensemble"]
    member: Annotated[int, Field(ge=0, lt=2**31)] = Field(description="which subset, from 0")
    ratio: Annotated[float, Field(ge=1)] = Field(
        1.0, description="samples of a class at most, as a multiple of the smallest class"
    )


class Weights(StrictModel):
    """Each sample in proportion to a weight of its own; an epoch has the data set's length."""

    name: Literal["weights"]
    file: str = Field(description="Parquet or CSV with columns `key` and `weight`")


def _from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Sampling = Annotated[
    Annotated[
        Uniform
        | Balanced
        | Tempered
        | Progressive
        | LabelShuffling
        | RepeatFactor
        | EasyEnsemble
        | Weights,
        Field(discriminator="name"),
    ],
    BeforeValidator(_from_name),
]
