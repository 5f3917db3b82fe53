"""Distillation as a recipe writes it; trainers/distillation and trainers/losses do it."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from bigbatch.configs.part import Fraction, NonNegative, Positive, StrictModel


class Hint(StrictModel):
    """Look where the teacher looks: at squared activations, averaged over channels, of a layer
    that gives maps, as unit vectors (attention transfer, Zagoruyko and Komodakis 2017, equation 2).
    """

    layer: str = Field(description="of the student, a module's name, such as layer3")
    teacher_layer: str | None = Field(None, description="of each member; null: of the same name")
    grid: Annotated[int, Field(ge=1, le=64)] = Field(
        8, description="rows and columns to which both maps are averaged by area"
    )
    weight: Positive = Field(1000.0, description="of the mean squared difference, in the loss")


class _Teacher(StrictModel):
    teacher: str = Field(description="a run, or a folder that `bigbatch ensemble` wrote")
    members: str = Field(
        "auto", description="of a run: auto, those that it kept; all; or names such as cycle-01,ema"
    )
    weight: Fraction = Field(
        0.9, description="of the teacher's part; the recipe's loss on labels has the rest"
    )
    hint: Hint | None = Field(None, description="learn from a layer inside the teacher as well")
    outputs: Literal["float32", "float16"] = Field(
        "float32", description="what the teacher's log-probabilities are rounded to, kept or not"
    )
    cache: str | None = Field(
        None,
        description="folder that keeps the teacher's outputs by view, for resumed runs and other "
        "students; by default .teacher-outputs beside the run",
    )
    cache_gb: NonNegative = Field(
        10.0, description="size of that folder, in 1e9 bytes, which it never exceeds; 0: none"
    )


class SoftTargets(_Teacher):
    """T^2 KL(teacher || student), both softened by a temperature T (Hinton et al. 2015)."""

    name: Literal["soft"]
    temperature: Positive = Field(4.0, description="divides logits and log-probabilities")


class LogitRegression(_Teacher):
    """Mean squared difference of logits, each row less its mean (Ba and Caruana 2014)."""

    name: Literal["logits"]


def _with_name(value: Any) -> Any:
    """Recipes that name no kind mean soft targets."""
    return {"name": "soft", **value} if isinstance(value, dict) else value


Distill = Annotated[
    SoftTargets | LogitRegression, Field(discriminator="name"), BeforeValidator(_with_name)
]


def refusals(recipe: Any) -> Iterator[str]:
    """What a teacher cannot be asked."""
    if recipe.distill is None:
        return
    for name in ("teacher", "cache"):
        path = getattr(recipe.distill, name)
        if path is not None and "://" in path:
            yield f"distill.{name} = {path} is a URL; give the path of a folder here"
