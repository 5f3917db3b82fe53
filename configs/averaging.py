"""An average of the weights that training passes through, as a recipe writes it.

trainers/planning/averaging.py says which weights enter it, trainers/optim/averaging.py keeps it.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from bigbatch.configs import durations
from bigbatch.configs.durations import Duration, Length, Period
from bigbatch.configs.part import StrictModel

CYCLE = "cycle"


def _period_or_cycle(text: Any) -> Any:
    if text == CYCLE:
        return text
    try:
        return durations.parse_period(text)
    except ValueError as error:
        raise ValueError(f"{error}; or write {CYCLE}, for the ends of cycles") from None


PeriodOrCycle = Annotated[
    Length | Literal["cycle"],
    BeforeValidator(_period_or_cycle),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "examples": ["1 epochs", "500 steps", CYCLE]}),
]


class EMA(StrictModel):
    """Exponential moving average: the weights after each update, the last ones the most."""

    name: Literal["ema"]
    half_life: Period = Field(
        description="training after which weights count half as much as the newest ones"
    )
    start: Duration = Field(Length(0, "steps"), description="weights up to here do not enter")


class SWA(StrictModel):
    """Stochastic weight averaging (Izmailov et al. 2018): the plain mean of some weights."""

    name: Literal["swa"]
    start: Duration = Field(description="the first weights that enter")
    every: PeriodOrCycle = Field(
        Length(1, "epochs"),
        description="from one to the next; cycle: those at the ends of the schedule's cycles",
    )


Average = Annotated[EMA | SWA, Field(discriminator="name")]


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's average needs that the recipe does not have."""
    average, schedule = recipe.average, recipe.schedule.name
    if isinstance(average, SWA) and average.every == CYCLE and schedule != "cycles":
        yield (
            f"average.every: cycle needs the schedule cycles, not {schedule}; set average.every to "
            "a duration, such as 1 epochs, or schedule.name to cycles"
        )
