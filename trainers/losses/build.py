"""What is minimised: from a recipe's loss to the objective that the loop calls."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.configs.distill import Distill, LogitRegression, SoftTargets
from bigbatch.configs.losses import CrossEntropy, Loss, Poly1
from bigbatch.trainers.losses.distillation import logit_regression, soft_targets

# Model, images [B, C, H, W], target probabilities [B, classes] -> mean loss over B, a scalar.
# It calls the model itself, so that a loss may look at features or ask a teacher. What such a
# loss learns belongs into the model's own tree, where checkpoints and backends see it.
# Distilled students take targets [B, 2, classes]: behind them the teacher's log-probabilities.
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]  # logits [B, C], target probabilities [B, C]


def build_objective(config: Loss, distill: Distill | None = None) -> Objective:
    """The objective of a recipe's `loss`, over soft targets as mixup and smoothing make them."""
    loss_function = build_loss(config)
    if distill is not None:
        loss_function = _with_teacher(loss_function, build_distillation(distill), distill.weight)

    def objective(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return loss_function(model(images), targets)

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


def _with_teacher(hard: LossFunction, soft: LossFunction, weight: float) -> LossFunction:
    """(1 - weight) hard + weight soft, over targets [B, 2, C]."""

    def loss_function(logits: Tensor, targets: Tensor) -> Tensor:
        labels, taught = targets.unbind(1)
        return (1 - weight) * hard(logits, labels) + weight * soft(logits, taught)

    return loss_function


def poly1(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """Mean over B of cross-entropy + epsilon (1 - p), p the target's probability."""
    target_probability = (targets * logits.softmax(1)).sum(1)
    return F.cross_entropy(logits, targets) + epsilon * (1 - target_probability).mean()
