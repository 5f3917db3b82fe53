"""Weights of classes in a loss, as a recipe writes them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from bigbatch.configs.part import NonNegative, StrictModel


class BalancedWeights(StrictModel):
    """Each class weighs the inverse of its number of training samples."""

    name: Literal["balanced"]


class EffectiveNumber(StrictModel):
    """(1 - beta) / (1 - beta^n) for a class of n training samples (Cui et al. 2019, equation 2)."""

    name: Literal["effective_number"]
    beta: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="0 weighs all alike; towards 1, by the inverse of n"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta == 0:
            raise ValueError(
                "beta 0 weighs all classes alike, as no class_weights do; raise it towards 1, or "
                "drop class_weights"
            )
        return self


class GivenWeights(StrictModel):
    """Weights by class, in the order of classes.txt; only their ratios matter."""

    name: Literal["given"]
    values: list[NonNegative] = Field(min_length=2, description="one for each class")


def _part_of_weights(value: Any) -> Any:
    """`none`, the name alone, or a list of the weights."""
    if isinstance(value, list):
        return {"name": "given", "values": value}
    if isinstance(value, str):
        return None if value == "none" else {"name": value}
    return value


_Weights = Annotated[BalancedWeights | EffectiveNumber | GivenWeights, Field(discriminator="name")]
ClassWeights = Annotated[
    _Weights | None,
    BeforeValidator(
        _part_of_weights,
        json_schema_input_type=_Weights | list[NonNegative] | Literal["none"] | None,
    ),
]
