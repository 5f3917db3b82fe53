"""Losses over soft targets, as mixup and label smoothing make them."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from bigbatch.configs.schema import Loss

LossFunction = Callable[[Tensor, Tensor], Tensor]


def build_loss(config: Loss) -> LossFunction:
    """A function of logits [B, C] and target probabilities [B, C]: the mean over B."""
    return partial(F.cross_entropy, label_smoothing=config.label_smoothing)
