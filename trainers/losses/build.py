"""What is minimised: from a recipe's loss to the objective that the loop calls."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.configs.distill import Distill, LogitRegression, SoftTargets
from bigbatch.configs.losses import CrossEntropy, Loss, Poly1
from bigbatch.trainers.losses.distillation import logit_regression, soft_targets
from bigbatch.trainers.losses.hint import Watched, attention_transfer

# Model, images [B, C, H, W], target probabilities [B, classes] -> mean loss over B, a scalar.
# It calls the model itself, so that a loss may look at features or ask a teacher. What such a
# loss learns belongs into the model's own tree, where checkpoints and backends see it.
# A student's targets are wider: behind them stand its teacher's outputs, [B, 2 classes + hint].
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]  # logits [B, C], target probabilities [B, C]


def build_objective(config: Loss) -> Objective:
    """The objective of a recipe's `loss`, over soft targets as mixup and smoothing make them."""
    loss_function = build_loss(config)

    def objective(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return loss_function(model(images), targets)

    return objective


def build_student_objective(config: Loss, distill: Distill, student: nn.Module) -> Objective:
    """The objective of a recipe with a teacher, over what `Teacher.outputs` puts behind targets.

    `student` is the plain module, a layer of which may be watched. Raises UserError where it has
    no such layer.
    """
    hard, soft = build_loss(config), build_distillation(distill)
    weight, hint = distill.weight, distill.hint
    watched = Watched(student, hint.layer, "the student") if hint is not None else None

    def objective(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        logits = model(images)
        classes = logits.shape[1]
        labels, taught, attention = targets.tensor_split((classes, 2 * classes), dim=1)
        loss = (1 - weight) * hard(logits, labels) + weight * soft(logits, taught)
        if hint is not None and watched is not None:
            loss = loss + hint.weight * attention_transfer(watched.take(), attention)
        return loss

    return objective


def build_loss(config: Loss) -> LossFunction:
    """The mean loss over a batch of logits; its gradient alone decides what a step does."""
    match config:
        case CrossEntropy():
            return partial(F.cross_entropy, label_smoothing=config.label_smoothing)
        case Poly1():
            return partial(poly1, epsilon=config.epsilon)


def build_distillation(config: Distill) -> LossFunction:
    """The mean over a batch of how far logits are from a teacher's log-probabilities."""
    match config:
        case SoftTargets():
            return partial(soft_targets, temperature=config.temperature)
        case LogitRegression():
            return logit_regression


def poly1(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """Mean over B of cross-entropy + epsilon (1 - p), p the target's probability."""
    target_probability = (targets * logits.softmax(1)).sum(1)
    return F.cross_entropy(logits, targets) + epsilon * (1 - target_probability).mean()
