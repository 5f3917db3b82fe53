"""Penalties on the weights, in the loss."""

import torch
from torch import Tensor, nn

from bigbatch.trainers.losses.build import Objective
from bigbatch.trainers.optim.groups import named_parameters


def penalised(objective: Objective, model: nn.Module, l1: float, l2: float) -> Objective:
    """`objective` + l1 sum |w| + l2 / 2 sum w^2, over the weights that decay would shrink.

    Both together are the elastic net (Zou and Hastie 2005). The penalty is in the loss of every
    micro-batch, so that it is once in their mean, and in the gradient that clipping, LARS and Adam
    see; decay apart from the gradient (Loshchilov and Hutter 2019) is optimizer.weight_decay.
    `model` is the plain module.
    """
    weights = [p for _, p, plain in named_parameters(model) if not plain]

    def with_penalty(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        loss = objective(model, images, targets)
        if l1:
            loss = loss + l1 * torch.stack([w.abs().sum() for w in weights]).sum()
        if l2:
            loss = loss + l2 / 2 * torch.stack([w.square().sum() for w in weights]).sum()
        return loss

    return with_penalty
