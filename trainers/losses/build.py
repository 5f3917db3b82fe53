"""What is minimised: from a recipe's loss to the objective that the loop calls."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.configs import losses as c
from bigbatch.configs import targets as t
from bigbatch.configs.distill import Distill, LogitRegression, SoftTargets
from bigbatch.trainers.losses import classification, margin, priors, targets
from bigbatch.trainers.losses.centres import CentreLoss
from bigbatch.trainers.losses.confusion import ConfusionCosts
from bigbatch.trainers.losses.distillation import logit_regression, soft_targets
from bigbatch.trainers.losses.head import WatchedClassifier, cosine_scale
from bigbatch.trainers.losses.hint import Watched, attention_transfer
from bigbatch.trainers.losses.priors import ClassCounts

# Model, images [B, C, H, W], target probabilities [B, classes] -> mean loss over B, a scalar.
# It calls the model itself, so that a loss may look at features or ask a teacher. What such a
# loss learns belongs into the model's own tree, where checkpoints and backends see it.
# A student's targets are wider: behind them stand its teacher's outputs, [B, 2 classes + hint].
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]  # logits [B, C], target probabilities [B, C]


@dataclass(frozen=True)
class Heard:
    """What a pass came to for each sample, off the graph."""

    logits: Tensor  # [B, C]; of three views of each sample [3B, C], the first ones first
    losses: Tensor  # [B], whose mean is the loss, without a teacher's or a penalty's part


@dataclass
class Course:
    """What a loss needs to know of a run's course; without one, all of it is behind.

    Class weights count from `weights_from` finished steps on: deferred re-weighting (Cao et al.
    2019, algorithm 1), where features are learned from the data as they are, and then rare
    classes get their weights. `costs` are those of the loss confusion_cost. Where somebody
    `listens`, `heard` is what the last pass came to for each sample.
    """

    weights_from: int = 0
    step: int = 0  # finished steps; the loop sets it
    costs: ConfusionCosts | None = None
    listens: bool = False
    heard: Heard | None = None

    @property
    def weighs(self) -> bool:
        return self.step >= self.weights_from


def build_objective(
    config: c.Loss,
    model: nn.Module | None = None,
    classes: ClassCounts | None = None,
    course: Course | None = None,
) -> Objective:
    """The objective of a recipe's `loss`, over soft targets as mixup and smoothing make them."""
    loss_function = build_loss(config, model, classes, course)

    def objective(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return loss_function(model(images), targets)

    return objective


def build_student_objective(
    config: c.Loss,
    distill: Distill,
    student: nn.Module,
    classes: ClassCounts | None = None,
    course: Course | None = None,
) -> Objective:
    """The objective of a recipe with a teacher, over what `Teacher.outputs` puts behind targets.

    `student` is the plain module, a layer of which may be watched. Raises UserError where it has
    no such layer.
    """
    hard = build_loss(config, student, classes, course)
    soft = build_distillation(distill)
    weight, hint = distill.weight, distill.hint
    watched = Watched(student, hint.layer, "the student") if hint is not None else None

    def objective(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        logits = model(images)
        width = logits.shape[1]
        labels, taught, attention = targets.tensor_split((width, 2 * width), dim=1)
        loss = (1 - weight) * hard(logits, labels) + weight * soft(logits, taught)
        if hint is not None and watched is not None:
            loss = loss + hint.weight * attention_transfer(watched.take(), attention)
        return loss

    return objective


def build_loss(
    config: c.Loss,
    model: nn.Module | None = None,
    classes: ClassCounts | None = None,
    course: Course | None = None,
) -> LossFunction:
    """The mean loss over a batch of logits; its gradient alone decides what a step does.

    `model`, the plain module, is for losses that look at its classifier; `classes`, of the
    training data, for those that go by them; `course` is the run's, which gets what the loss
    keeps. Raises UserError where a model or classes do not fit.
    """
    if isinstance(config, c.CrossEntropy) and config.class_weights is None:
        plain = partial(F.cross_entropy, label_smoothing=config.label_smoothing)
        return _heard_twice(plain, partial(plain, reduction="none"), course)
    terms = _terms(config, model, classes, course)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        losses = terms(logits, targets)
        if course is not None and course.listens:
            course.heard = Heard(logits.detach(), losses.detach())
        return losses.mean()

    return loss


def _heard_twice(mean: LossFunction, terms: LossFunction, course: Course | None) -> LossFunction:
    """A mean that one kernel makes, with its terms by another where somebody listens: what a run
    records must not change a bit of what it learns."""
    if course is None:
        return mean

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        if course.listens:
            detached = logits.detach()
            course.heard = Heard(detached, terms(detached, targets))
        return mean(logits, targets)

    return loss


def _terms(
    config: c.Loss, model: nn.Module | None, classes: ClassCounts | None, course: Course | None
) -> LossFunction:
    """The loss [B] of logits, [B, C] or of each view, and target probabilities [B, C]."""
    if isinstance(config, c.ConfusionCost):
        assert classes is not None, "the recipe refuses a stream"
        costs = ConfusionCosts(len(classes.names), config.share)
        if course is not None:
            course.costs = costs
        return lambda z, v: classification.expected_cost(z, v, costs.like(z))
    if isinstance(config, c.JSD):
        return partial(classification.jsd, factor=config.weight)
    per_sample = _per_sample(config, model, classes)
    smoothing: float = getattr(config, "label_smoothing", 0.0)
    by_class: Callable[[Tensor], Tensor] | None = None
    if (weights := getattr(config, "class_weights", None)) is not None:
        assert classes is not None, "the recipe refuses class weights of a stream"
        by_class = _constant(priors.class_weights(weights, classes))

    def terms(logits: Tensor, targets: Tensor) -> Tensor:
        if by_class is not None and (course is None or course.weighs):
            targets = targets * by_class(targets)
        if smoothing:
            targets = classification.smoothed(targets, smoothing)
        return per_sample(logits, targets)

    return terms


def _per_sample(
    config: c.Loss, model: nn.Module | None, classes: ClassCounts | None
) -> LossFunction:
    """The loss [B] of logits and of weights of labels, both [B, C]; of outputs and targets."""
    match config:
        case c.CrossEntropy():
            return classification.cross_entropy
        case c.Poly1():
            return partial(classification.poly1, epsilon=config.epsilon)
        case c.BCE(pos_weight=pos_weight, over_classes=over, target_threshold=threshold):
            if threshold is None:
                return partial(classification.bce, pos_weight=pos_weight, over_classes=over)
            return partial(
                classification.bce_above,
                threshold=threshold,
                pos_weight=pos_weight,
                over_classes=over,
            )
        case c.FocalSigmoid():
            return partial(classification.focal_sigmoid, gamma=config.gamma, alpha=config.alpha)
        case c.FocalSoftmax():
            return partial(classification.focal_softmax, gamma=config.gamma)
        case c.Hinge():
            return partial(classification.hinge, margin=config.margin)
        case c.Ramp():
            return partial(classification.ramp, s=config.s)
        case c.ExpectedCost():
            costs = _constant(_costs(config, classes))
            return lambda z, v: classification.expected_cost(z, v, costs(z))
        case c.ConfusionCost() | c.JSD():
            raise AssertionError("`_terms` makes it")
        case c.LogitAdjusted():
            assert classes is not None, "the recipe refuses a stream"
            prior = _constant(config.tau * priors.log_shares(classes))
            return lambda z, v: classification.cross_entropy(z + prior(z), v)
        case c.LDAM():
            assert classes is not None, "the recipe refuses a stream"
            largest = config.max_margin * (cosine_scale(model) or 1.0)
            margins = _constant(priors.ldam_margins(classes, largest))
            return lambda z, v: margin.ldam(z, v, margins(z))
        case c.ArcFace() | c.CosFace():
            scale = cosine_scale(model)
            assert scale is not None, "the recipe refuses other heads"
            of_cosines = margin.arcface if isinstance(config, c.ArcFace) else margin.cosface
            return partial(of_cosines, scale=scale, margin=config.margin)
        case c.Center():
            assert model is not None
            return CentreLoss(model, config.weight, config.centre_rate)
        case t.L1():
            return targets.l1
        case t.L2():
            return targets.l2
        case t.SmoothL1():
            return partial(targets.smooth_l1, beta=config.beta)
        case t.Tukey():
            scale = None if config.scale == "mad" else config.scale
            return partial(targets.tukey, c=config.c, scale=scale)
        case t.KL():
            return targets.kl
        case c.LargeMargin():
            assert model is not None
            watched = WatchedClassifier(model, "loss large_margin")
            return lambda z, v: margin.large_margin(
                z, v, *watched.take(), config.margin, config.plain_share
            )


def _costs(config: c.ExpectedCost, classes: ClassCounts | None) -> Tensor:
    """Of each answer for each truth, [C, C]."""
    if config.cost_matrix is not None:
        costs = torch.tensor(config.cost_matrix, dtype=torch.float64)
    else:
        missing = torch.tensor(config.cost_vector, dtype=torch.float64)
        costs = missing[:, None] * (1 - torch.eye(len(missing), dtype=torch.float64))
    if classes is not None:
        priors.check_length("loss expected_cost", len(costs), classes)
    return costs


def _constant(values: Tensor) -> Callable[[Tensor], Tensor]:
    """`values` as any tensor is: on its device, of its type. Copied once for each."""

    @cache
    def of(device: torch.device, dtype: torch.dtype) -> Tensor:
        return values.to(device, dtype)

    return lambda like: of(like.device, like.dtype)


def build_distillation(config: Distill) -> LossFunction:
    """The mean over a batch of how far logits are from a teacher's log-probabilities."""
    match config:
        case SoftTargets():
            return partial(soft_targets, temperature=config.temperature)
        case LogitRegression():
            return logit_regression
