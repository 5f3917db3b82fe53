"""The base of every part of a recipe, and the types of its numbers."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from bigbatch.configs.size import Size

_LEAST, _MOST = 8, 4096  # pixels of a side


class StrictModel(BaseModel):
    """Frozen; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


def _parse_size(value: Any) -> Size:
    """A side, or [height, width]; equal sides are one."""
    sides = [value] * 2 if isinstance(value, int) else value
    right = isinstance(sides, list | tuple) and len(sides) == 2
    if not (right and all(type(side) is int and _LEAST <= side <= _MOST for side in sides)):
        raise ValueError(
            f"{value!r} is no size of images: write the pixels of a side, or [height, width], each "
            f"from {_LEAST} to {_MOST}"
        )
    height, width = sides
    return height if height == width else (height, width)


_SIDE = {"type": "integer", "minimum": _LEAST, "maximum": _MOST}
ImageSize = Annotated[
    Size,
    BeforeValidator(_parse_size),
    WithJsonSchema(
        {"anyOf": [_SIDE, {"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2}]}
    ),
]
Range = tuple[Positive, Positive]
Share = Annotated[float, Field(gt=0, le=1)]
