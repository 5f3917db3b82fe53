"""The loss as a recipe writes it; trainers/losses builds it. docs/craft.md explains.

Those of a classifier; what learns numbers or distributions is in targets.py.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from bigbatch.configs.class_weights import BalancedWeights, ClassWeights, EffectiveNumber
from bigbatch.configs.durations import Duration, Length
from bigbatch.configs.part import Fraction, NonNegative, Positive, StrictModel
from bigbatch.configs.targets import KL, L1, L2, SmoothL1, Tukey

Smoothing = Annotated[float, Field(ge=0, lt=1)]


class _Weighted(StrictModel):
    class_weights: ClassWeights = Field(
        None,
        description="none, balanced, {name: effective_number, beta: 0.999} or a list; scaled so "
        "that their mean over the training samples is 1",
    )
    class_weights_from: Duration = Field(
        Length(0, "steps"),
        description="how far into the run they begin to count, all classes alike before: deferred "
        "re-weighting (Cao et al. 2019, algorithm 1)",
    )


class CrossEntropy(_Weighted):
    """Minus the log-probability of the target, mixed over classes where targets are soft."""

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Smoothing = Field(
        0.0, description="share of the target that is spread over all classes"
    )


class Poly1(_Weighted):
    """Cross-entropy with its first polynomial coefficient raised by `epsilon`.

    Leng et al. 2022, "PolyLoss", equation 6: -log p + epsilon (1 - p), p being the probability
    of the target; on soft targets t it is sum(t p), as in the paper's own code.
    """

    name: Literal["poly1"]
    epsilon: Annotated[float, Field(ge=-1)] = Field(
        1.0, description="added to the first coefficient, which is 1"
    )


class BCE(_Weighted):
    """A yes or no for each class: binary cross-entropy of sigmoids (Wightman et al. 2021, A1)."""

    name: Literal["bce"]
    over_classes: Literal["sum", "mean"] = Field(
        "sum", description="mean, as timm has it by default, makes gradients C times smaller"
    )
    pos_weight: Positive = Field(1.0, description="of the part of a class that is there")
    label_smoothing: Smoothing = Field(
        0.0, description="share of the target that is spread over all classes"
    )
    target_threshold: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="of mixed images, shares above it count as 1, all others as 0: one of 0.7 and "
        "0.3 then is wholly of both classes, as in timm",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.target_threshold is not None and self.label_smoothing:
            raise ValueError(
                f"target_threshold {self.target_threshold:g} makes targets 0 and 1 again, so that "
                f"label_smoothing {self.label_smoothing:g} does nothing; drop one of them"
            )
        if self.target_threshold is not None and self.class_weights is not None:
            raise ValueError(
                f"target_threshold {self.target_threshold:g} leaves no shares of classes that "
                "class_weights could weigh; drop one of them"
            )
        return self


class FocalSigmoid(_Weighted):
    """A yes or no for each class, easy ones weighed down (Lin et al. 2017, equation 5).

    Summed over classes; on labels it is torchvision's sigmoid_focal_loss.
    """

    name: Literal["focal_sigmoid"]
    gamma: NonNegative = Field(2.0, description="how much less easy samples count; 0: all alike")
    alpha: Fraction | None = Field(
        0.25, description="weight of the class that is there; 1 - alpha of the others; null: none"
    )


class FocalSoftmax(_Weighted):
    """(1 - p)^gamma times cross-entropy, p being the probability of the target."""

    name: Literal["focal_softmax"]
    gamma: NonNegative = Field(2.0, description="how much less easy samples count; 0: all alike")


class Hinge(_Weighted):
    """Multi-class hinge: the target's logit beats each other one by `margin`.

    Crammer and Singer 2001; max(0, margin + max of the others - the target's).
    """

    name: Literal["hinge"]
    margin: Positive = Field(1.0, description="by which the target's logit should win")


class Ramp(_Weighted):
    """The hinge, cut off at 1 - s, so that hopeless samples pull no more.

    Collobert et al. 2006, "Trading convexity for scalability", equation 4, of the margin between
    the target's logit and the largest other.
    """

    name: Literal["ramp"]
    s: Annotated[float, Field(lt=1)] = Field(
        -1.0, description="margin below which a sample pulls no more"
    )


class ExpectedCost(StrictModel):
    """What answers cost on average, drawn by the model's probabilities (Elkan 2001).

    Give the costs of missing each class, or those of each answer [truth][answer].
    """

    name: Literal["expected_cost"]
    cost_vector: list[NonNegative] | None = Field(
        None, min_length=2, description="cost of missing each class"
    )
    cost_matrix: list[list[NonNegative]] | None = Field(
        None, min_length=2, description="cost of each answer: [truth][answer]"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.cost_vector is None) == (self.cost_matrix is None):
            raise ValueError("give either cost_vector or cost_matrix, one of them")
        rows = self.cost_matrix or []
        if not any([*(self.cost_vector or []), *(cost for row in rows for cost in row)]):
            raise ValueError("all costs are 0, and nothing would be learned; give some answers one")
        if any(len(row) != len(rows) for row in rows):
            raise ValueError(
                f"cost_matrix has {len(rows)} rows of {sorted({len(row) for row in rows})} "
                "numbers; give each class a row, and in it a number for each class"
            )
        return self


class ConfusionCost(StrictModel):
    """Expected cost whose costs follow what the last evaluation confused.

    (1 - share) + share r / mean r for each pair of classes, r the share of a class's validation
    samples that were answered so; every cost is 1 before the first evaluation.
    """

    name: Literal["confusion_cost"]
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="of the costs that follows confusions; the rest is the same for all"
    )


class JSD(StrictModel):
    """Cross-entropy of the plain image + weight times how much two AugMix views of it differ.

    Hendrycks et al. 2020, "AugMix", equations 2 and 3: the Jensen-Shannon divergence of the three
    predictions. A micro-batch passes three images of each sample.
    """

    name: Literal["jsd"]
    weight: Positive = Field(12.0, description="lambda of the paper")


class LogitAdjusted(StrictModel):
    """Cross-entropy of logits + tau log(share of the class in the training data).

    Menon et al. 2021, "Long-tail learning via logit adjustment", equation 10; predictions take
    the logits as they are.
    """

    name: Literal["logit_adjusted"]
    tau: Positive = Field(1.0, description="weight of the class shares; 1 is Bayes-consistent")


class LDAM(_Weighted):
    """Label-distribution-aware margins: in proportion to n^(-1/4), n samples of the class.

    Cao et al. 2019, equations 10 and 13.
    """

    name: Literal["ldam"]
    max_margin: Positive = Field(
        0.5, description="of the rarest class: in logits, or in cosines of a cosine head"
    )


class LargeMargin(_Weighted):
    """Large-margin softmax: the target's angle counts `margin` times (Liu et al. 2016).

    Equations 4 to 6. The classifier's bias, where it has one, is added after the margin.
    """

    name: Literal["large_margin"]
    margin: Annotated[int, Field(ge=1, le=4)] = Field(
        2, description="times that the target's angle counts"
    )
    plain_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.8,
        description="of the plain logit: lambda / (1 + lambda) of section 5.1. From weights that "
        "were not trained with a high one, 0 tends to end with all features 0",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.margin == 1:
            raise ValueError(
                "margin 1 leaves the angle as it is, as cross_entropy does; set it to 2, 3 or 4, "
                "or take loss cross_entropy"
            )
        return self


class ArcFace(_Weighted):
    """Cosine head: the label's angle a counts as a + margin (Deng et al. 2019, equation 3)."""

    name: Literal["arcface"]
    margin: Annotated[float, Field(gt=0, lt=math.pi / 2)] = Field(0.5, description="in radians")


class CosFace(_Weighted):
    """Cosine head: the label's cosine counts less by `margin` (Wang et al. 2018, equation 4)."""

    name: Literal["cosface"]
    margin: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.35, description="taken off the label's cosine"
    )


class Center(_Weighted):
    """Cross-entropy + weight / 2 |x - c|^2, x the classifier's input and c its label's centre.

    Wen et al. 2016, "A discriminative feature learning approach for deep face recognition",
    equation 5. The centres learn with the weights, by gradient and without decay.
    """

    name: Literal["center"]
    weight: Positive = Field(0.003, description="lambda of the paper")
    centre_rate: Positive = Field(
        0.5, description="of the centres' gradient, whatever the weight; alpha of the paper"
    )


Margin = LDAM | LargeMargin | ArcFace | CosFace | Center  # of one label for each image


def _with_name(value: Any) -> Any:
    """Recipes that name no loss mean cross-entropy."""
    return {"name": "cross_entropy", **value} if isinstance(value, dict) else value


Loss = Annotated[
    CrossEntropy
    | Poly1
    | BCE
    | FocalSigmoid
    | FocalSoftmax
    | Hinge
    | Ramp
    | ExpectedCost
    | ConfusionCost
    | JSD
    | LogitAdjusted
    | LDAM
    | LargeMargin
    | ArcFace
    | CosFace
    | Center
    | L1
    | L2
    | SmoothL1
    | Tukey
    | KL,
    Field(discriminator="name"),
    BeforeValidator(_with_name),
]


def refusals(recipe: Any) -> Iterator[str]:
    """What a recipe's loss cannot be asked beside its other keys."""
    loss, sampling = recipe.loss, recipe.data.sampling.name
    mixing = [k for k in ("mixup", "cutmix") if getattr(recipe.augment, k)]
    if isinstance(loss, Margin) and mixing:
        yield (
            f"loss {loss.name} gives one class of each image a margin, and augment.{mixing[0]} "
            f"makes images of two; set augment.{mixing[0]} to 0, or take another loss"
        )
    if isinstance(loss, JSD):
        names = [op.name for op in recipe.augment.ops]
        if names.count("augmix") != 1 or names[-1] != "augmix":
            yield (
                "loss jsd compares an image with two AugMix views of it, and augment.ops "
                f"{'has no augmix' if 'augmix' not in names else 'has augmix not once, and last'}; "
                "put one augmix at its end, or take another loss"
            )
        if mixing:
            yield (
                f"loss jsd compares views of one image, and augment.{mixing[0]} mixes two; set "
                f"augment.{mixing[0]} to 0, or take another loss"
            )
        if recipe.distill is not None:
            yield "loss jsd has three images of a sample, a teacher sees one; drop one of them"
    if isinstance(loss, BCE) and loss.target_threshold is not None and not mixing:
        yield (
            f"loss.target_threshold = {loss.target_threshold:g} changes targets of mixed images "
            "alone, and augment mixes none; drop it"
        )
    head = recipe.model.head
    if isinstance(loss, ArcFace | CosFace) and (head is None or head.name != "cosine"):
        yield (
            f"loss {loss.name} is one of cosines, which the model's own classifier does not give; "
            "set model.head={name: cosine, scale: 64}, or take another loss"
        )
    weights = getattr(loss, "class_weights", None)
    if weights is None and (later := getattr(loss, "class_weights_from", None)) and later.value:
        yield (
            f"loss.class_weights_from = {later} defers class weights, and there are none; set "
            "loss.class_weights, such as {name: effective_number, beta: 0.9999}, or drop it"
        )
    if isinstance(loss, ConfusionCost) and recipe.data.stream is not None:
        yield (
            "loss confusion_cost goes by the classes of an index, and data.stream has none; index "
            "the tars and set data.path, or take another loss"
        )
    counted = "" if weights is None else f"loss.class_weights: {weights.name}"
    if isinstance(loss, LogitAdjusted | LDAM):
        counted = f"loss {loss.name}"
    if counted and recipe.data.stream is not None:
        yield (
            f"{counted} needs the number of training samples of each class, and data.stream has "
            "no index; index the tars and set data.path, or take another loss"
        )
    evened = isinstance(weights, BalancedWeights | EffectiveNumber) or isinstance(
        loss, LogitAdjusted
    )
    if evened and sampling != "uniform":
        yield (
            f"{counted} evens classes out, and so does data.sampling = {sampling}: rare ones would "
            "count twice; set data.sampling to uniform, or change the loss"
        )
