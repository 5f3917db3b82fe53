"""The loss as a recipe writes it; trainers/losses builds it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from bigbatch.configs.part import StrictModel


class CrossEntropy(StrictModel):
    """Minus the log-probability of the target, mixed over classes where targets are soft."""

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


def _with_name(value: Any) -> Any:
    """Recipes that name no loss mean cross-entropy."""
    return {"name": "cross_entropy", **value} if isinstance(value, dict) else value


Loss = Annotated[CrossEntropy, BeforeValidator(_with_name)]
