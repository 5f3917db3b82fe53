"""What is minimised: from a recipe's loss to the objective that the loop calls."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.configs.losses import CrossEntropy, Loss, Poly1

# Model, images [B, C, H, W], target probabilities [B, classes] -> mean loss over B, a scalar.
# It calls the model itself, so that a loss may look at features or ask a teacher. What such a
# loss learns belongs into the model's own tree, where checkpoints and backends see it.
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]  # logits [B, C], target probabilities [B, C]


def build_objective(config: Loss) -> Objective:
    """The objective of a recipe's `loss`, over soft targets as mixup and smoothing make them."""
    loss_function = build_loss(config)

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


def poly1(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """Mean over B of cross-entropy + epsilon (1 - p), p the target's probability."""
    target_probability = (targets * logits.softmax(1)).sum(1)
    return F.cross_entropy(logits, targets) + epsilon * (1 - target_probability).mean()
