"""Durations: a length of training in exactly one unit."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

UNITS = ("epochs", "steps", "samples")
_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kKMG]?)\s*(epoch|step|sample)s?\s*$")
_SCALE = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
_LONGEST = 1e15  # of any unit: steps and samples are still exact in float64


@dataclass(frozen=True)
class Length:
    """A duration such as ``90 epochs``, ``2000 steps`` or ``1.2M samples``."""

    value: float
    unit: str

    def samples(self, global_batch: int, epoch_samples: int) -> float:
        """How many samples this length is, not rounded.

        `epoch_samples` is the number of samples that the order policy puts in one epoch.
        """
        per_unit = {"epochs": epoch_samples, "samples": 1, "steps": global_batch}
        return self.value * per_unit[self.unit]

    def steps(self, global_batch: int, epoch_samples: int) -> int:
        """Whole optimizer steps that cover this length (rounded up; 0 for no length at all)."""
        # The epsilon keeps 0.1 epochs of 1000 samples at 100, not 100.00000000000001.
        steps = math.ceil(self.samples(global_batch, epoch_samples) / global_batch - 1e-9)
        return max(steps, int(self.value > 0))

    def __str__(self) -> str:
        return f"{self.value:.12g} {self.unit}"


def parse(text: Any) -> Length:
    """Read a duration; raise ValueError where it is not one number and one unit."""
    if isinstance(text, Length):
        return text
    match = _PATTERN.match(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(
            f"{text!r} is not a duration; write one number and one unit, such as "
            "'90 epochs', '2000 steps' or '1.2M samples'"
        )
    value = float(match[1]) * _SCALE[match[2]]
    if value > _LONGEST:
        raise ValueError(f"it is longer than {_LONGEST:.0e} {match[3]}s; write a shorter one")
    return Length(value, match[3] + "s")


def parse_period(text: Any) -> Length:
    """The same, of a duration that takes time."""
    length = parse(text)
    if length.value == 0:
        raise ValueError(
            f"{length} is no time at all; write a longer one (an `every` as long as the run "
            "means: at its end alone)"
        )
    return length


_SHAPE = (
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": _PATTERN.pattern,
            "examples": ["90 epochs", "2000 steps", "1.2M samples"],
        }
    ),
)
Duration = Annotated[Length, BeforeValidator(parse), *_SHAPE]
Period = Annotated[Length, BeforeValidator(parse_period), *_SHAPE]  # more than 0
