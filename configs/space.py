"""The file that says what `bigbatch tune` searches: recipe keys, their ranges, objectives."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from bigbatch.configs.errors import UserError
from bigbatch.configs.judged import SCORES, judged_by, shown
from bigbatch.configs.load import load_recipe, read_yaml
from bigbatch.configs.notices import notice
from bigbatch.configs.part import Positive, StrictModel
from bigbatch.configs.renamed import RENAMED
from bigbatch.configs.schema import Recipe

Objective = Literal["accuracy", "nll", "ece", "mae", "rmse", "r2", "kl", "mode", "seconds"]
_EXAMPLE = "optimizer.lr: {type: float, low: 0.1, high: 10, log: true}"
# By which trials are compared while they run: scores of each evaluation, that decide something.
COMPARED = tuple(key for key in SCORES if key != "ece")
MAXIMISED = tuple(key for key, score in SCORES.items() if score.more_is_better)


class Float(StrictModel):
    """A real number from `low` to `high`, both included."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = Field(False, description="equal ratios are equally likely")
    step: Positive | None = Field(None, description="grid from low; not together with log")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_range(self.low, self.high, self.log)
        if self.log and self.step is not None:
            raise ValueError("log: true and step exclude each other; drop one of them")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(
                f"step {self.step:g} is longer than the way from {self.low:g} to {self.high:g}; "
                "write a shorter one"
            )
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        return (self.low, self.high)


class Int(StrictModel):
    """A whole number from `low` to `high`, both included."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_range(self.low, self.high, self.log)
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        return (self.low, self.high)


class Choice(StrictModel):
    """One of several values: numbers, texts, or whole parts of a recipe."""

    type: Literal["choice"]
    choices: list[JsonValue] = Field(min_length=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        texts = sorted(json.dumps(c, sort_keys=True) for c in self.choices)
        double = [a for a, b in pairwise(texts) if a == b]
        if double:
            raise ValueError(f"choice {double[0]} is written twice; remove one of them")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        return tuple(self.choices)


Parameter = Annotated[Float | Int | Choice, Field(discriminator="type")]


class Space(StrictModel):
    """What is searched, and what for."""

    objectives: list[Objective] = Field(["accuracy"], min_length=1, max_length=3)
    parameters: dict[str, Parameter] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives {self.objectives}: name each one once")
        return self


def _check_range(low: float, high: float, log: bool) -> None:
    if low >= high:
        raise ValueError(f"low {low:g} is not below high {high:g}")
    if log and low <= 0:
        raise ValueError(f"log: true needs low above 0, not {low:g}")


def override(key: str, value: Any) -> str:
    """The change to a recipe that sets `key`: KEY=VALUE, the value as JSON, which is YAML."""
    return f"{key}={json.dumps(value)}"


def load_space(path: Path, recipe: str, overrides: tuple[str, ...] = ()) -> Space:
    """Read a space file, and try both ends of each range, or each choice, on the recipe.

    A key keeps the name that the file gives it, so that a study goes on; old names are said.

    Raises UserError with all problems of the file, or the first value that the recipe
    refuses, before anything starts.
    """
    try:
        space = Space.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(e)}" for e in error.errors())
        raise UserError(f"space {path}:\n{lines}") from None
    _check_objectives(space, path, load_recipe(recipe, overrides, say=None))
    for key, parameter in space.parameters.items():
        if new := RENAMED.get(key):
            if new in space.parameters:
                raise UserError(f"space {path}: {key} is the old name of {new}; remove {key}")
            notice(f"{path}: {key} is now called {new}; write that")
        for value in parameter.ends:
            try:
                load_recipe(recipe, [*overrides, override(key, value)], say=None)
            except UserError as error:
                raise UserError(f"space {path}: {override(key, value)} in {error}") from None
    return space


def _check_objectives(space: Space, path: Path, recipe: Recipe) -> None:
    """Raise UserError for a score that runs of the recipe do not have."""
    scores = [score.key for score in shown(judged_by(recipe))]
    for objective in space.objectives:
        if objective not in (*scores, "seconds"):
            raise UserError(
                f"space {path}: objectives: {objective} is no score of loss {recipe.loss.name}; "
                f"write {', '.join(scores)} or seconds"
            )


def _explain(error: Any) -> str:
    """One line for one pydantic error: place and rule."""
    tags = {"float", "int", "choice"}
    place = [str(p) for i, p in enumerate(error["loc"]) if not (i == 2 and p in tags)]
    where = ".".join(place) or "space"
    absent = error["type"] == "missing"
    message = "missing" if absent else error["msg"].removeprefix("Value error, ")
    if place == ["parameters"] or error["type"] == "model_attributes_type":
        return f"{where}: {message}; write recipe keys with their ranges, such as {_EXAMPLE}"
    if error["type"] == "extra_forbidden":
        models: dict[str, type[StrictModel]] = {"float": Float, "int": Int, "choice": Choice}
        model = models.get(str(error["loc"][2]), Space) if len(error["loc"]) > 2 else Space
        return f"{where}: unknown key; valid keys: {', '.join(model.model_fields)}"
    return f"{where}: {message}"
