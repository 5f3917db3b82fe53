"""The loss as a recipe writes it; trainers/losses builds it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from bigbatch.configs.part import StrictModel


class CrossEntropy(StrictModel):
    """Minus the log-probability of the target, mixed over classes where targets are soft."""

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Poly1(StrictModel):
    """Cross-entropy with its first polynomial coefficient raised by `epsilon`.

    Leng et al. 2022, "PolyLoss", equation 6: -log p + epsilon (1 - p), p being the probability
    of the target; on soft targets t it is sum(t p), as in the paper's own code.
    """

    name: Literal["poly1"]
    epsilon: Annotated[float, Field(ge=-1)] = 1.0


def _with_name(value: Any) -> Any:
    """Recipes that name no loss mean cross-entropy."""
    return {"name": "cross_entropy", **value} if isinstance(value, dict) else value


Loss = Annotated[CrossEntropy | Poly1, Field(discriminator="name"), BeforeValidator(_with_name)]
