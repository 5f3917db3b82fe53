"""Losses of what learns numbers, or the shares of classes, instead of labels.

Numbers are learned in units of their own spread over the training split: (target - mean) / std, so
that one rate does for ages and for poses. What is predicted and scored is in the targets' own unit.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from bigbatch.configs import judged
from bigbatch.configs.part import Positive, StrictModel

_LEAST_FOR_MEDIAN = 8  # numbers of which a median absolute deviation says anything


def _parse_statistic(value: Any) -> Any:
    """Numbers, one of which stands for a list of one, or measured."""
    values = value if isinstance(value, list | tuple) else [value]
    numbers = all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in values
    )
    if not numbers and value != "measured":
        raise ValueError(f"{value!r} is neither a number for each target nor measured")
    return [float(x) for x in values] if numbers else value


_NUMBERS = {"type": "array", "items": {"type": "number"}}
Statistic = Annotated[
    list[float] | Literal["measured"],
    BeforeValidator(_parse_statistic),
    WithJsonSchema({"anyOf": [_NUMBERS, {"type": "number"}, {"const": "measured"}]}),
]


class _Standardised(StrictModel):
    judge: ClassVar[judged.Score] = judged.MAE

    mean: Statistic = Field(
        "measured",
        description="taken off each target; measured: the mean over the training split, which the "
        "run's own recipe then says",
    )
    std: Statistic = Field("measured", description="each target is divided by it, or measured")

    @model_validator(mode="after")
    def _check(self) -> Self:
        mean, std = self.mean, self.std
        if isinstance(std, list) and not (std and all(x > 0 for x in std)):
            raise ValueError(f"std {std}: give each target one above 0; [1] leaves it as it is")
        if isinstance(mean, list) and isinstance(std, list) and len(mean) != len(std):
            raise ValueError(
                f"mean has {len(mean)} numbers and std {len(std)}; one for each target"
            )
        return self

    @property
    def scaling(self) -> tuple[list[float], list[float]]:
        """Mean and std as numbers, which a run's recipe has (data/measured.py)."""
        assert isinstance(self.mean, list), "they are measured before they are used"
        assert isinstance(self.std, list), "they are measured before they are used"
        return self.mean, self.std


class L1(_Standardised):
    """Mean absolute error over the targets."""

    name: Literal["l1"]


class L2(_Standardised):
    """Mean squared error over the targets."""

    name: Literal["l2"]


class SmoothL1(_Standardised):
    """Squared up to an error of `beta`, absolute beyond (Girshick 2015, equation 3, at beta 1)."""

    name: Literal["smooth_l1"]
    beta: Positive = Field(1.0, description="in standard deviations of the target")


class Tukey(_Standardised):
    """Tukey's biweight: errors beyond c robust deviations pull no more.

    Belagiannis et al. 2015, "Robust optimization for deep regression", equations 3 to 6. An error
    counts in units of 1.4826 times the median absolute deviation of the errors of its micro-batch,
    by target, which is taken as given in the gradient; or in those of `scale`.
    """

    name: Literal["tukey"]
    c: Positive = Field(4.685, description="95 % as efficient as l2 where errors are normal")
    scale: Annotated[float, Field(gt=0)] | Literal["mad"] = Field(
        "mad",
        description="unit of errors: mad, the micro-batch's own, at least 0.001; or so many "
        "standard deviations of the target",
    )


class KL(StrictModel):
    """Kullback-Leibler divergence of the predicted shares of classes from the true ones."""

    judge: ClassVar[judged.Score] = judged.KL

    name: Literal["kl"]


Regression = L1 | L2 | SmoothL1 | Tukey
TargetLoss = Regression | KL


def learns_targets(recipe: Any) -> bool:
    """Whether a recipe learns what stands beside labels: numbers or distributions."""
    return isinstance(recipe.loss, TargetLoss)


def learns_numbers(recipe: Any) -> bool:
    return isinstance(recipe.loss, Regression)


def _plateaus(schedule: Any) -> Iterator[str]:
    """The metric of each plateau in a schedule."""
    if schedule.name == "plateau":
        yield schedule.metric
    for piece in getattr(schedule, "pieces", ()):
        yield from _plateaus(piece.schedule)


def refusals(recipe: Any) -> Iterator[str]:
    """What has no meaning for numbers or distributions, and which scores a recipe has."""
    scores = [score.key for score in judged.shown(judged.judged_by(recipe))]
    for metric in _plateaus(recipe.schedule):
        if metric not in scores:
            yield (
                f"schedule plateau looks at {metric}, which is no score of loss "
                f"{recipe.loss.name}; set its metric to {' or '.join(scores)}"
            )
    if not isinstance(recipe.loss, TargetLoss):
        return
    name, numbers = recipe.loss.name, isinstance(recipe.loss, Regression)
    if recipe.data.stream is not None:
        yield (
            f"loss {name} learns targets, which are read from an index, and data.stream has none; "
            "index the tars and set data.path"
        )
    if recipe.log.samples:
        yield (
            f"log.samples keeps the margin and the probability of a label, and loss {name} learns "
            "targets; set log.samples=false"
        )
    if recipe.distill is not None:
        yield f"distill takes a classifier's answers, and loss {name} makes none; drop one of them"
    init, head = recipe.model.init, recipe.model.head
    if init is not None and init.head_prior:
        yield (
            f"model.init.head_prior starts from the shares of labels, and loss {name} learns "
            "targets; leave it out"
        )
    if head is not None and head.name == "cosine":
        yield (
            f"model.head = cosine gives cosines of classes, and loss {name} learns targets; leave "
            "it out"
        )
    if numbers and recipe.augment.cutmix:
        yield (
            f"augment.cutmix pastes a part of an image, whose share of pixels says nothing of loss "
            f"{name}'s numbers; set it to 0 (augment.mixup mixes targets as it mixes images)"
        )
    loss = recipe.loss
    if isinstance(loss, Tukey) and loss.scale == "mad" and recipe.micro_batch < _LEAST_FOR_MEDIAN:
        yield (
            f"loss.scale = mad is the median error of a micro-batch, and micro_batch is "
            f"{recipe.micro_batch}; raise it to {_LEAST_FOR_MEDIAN} or more, or give loss.scale a "
            "number, such as 0.5"
        )
