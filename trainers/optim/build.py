"""From a recipe's optimizer to a torch optimizer, and the learning rate of each step."""

from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.configs import optimizers as c
from bigbatch.trainers.optim.groups import parameter_groups
from bigbatch.trainers.optim.lamb import LAMB
from bigbatch.trainers.optim.lars import LARS


def build_optimizer(model: nn.Module, config: c.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that a recipe names, over the trainable parameters of `model`.

    Norm layers and biases take neither weight decay nor a layer-wise rate. Each group keeps
    its rate from the recipe as `base_lr`; `set_lr` multiplies it by the schedule's factor.
    """
    options: dict[str, Any] = config.model_dump(exclude={"name", "weight_decay"})
    groups = parameter_groups(model, config.weight_decay)
    # One pass over memory on CPU and GPU, instead of one kernel for each operation.
    fused = all(_can_fuse(p) for g in groups for p in g["params"])
    optimizer: torch.optim.Optimizer
    match config:
        case c.SGD():
            optimizer = torch.optim.SGD(groups, **options, fused=fused)
        case c.AdamW():
            optimizer = torch.optim.AdamW(groups, **options, fused=fused)
        case c.LARS():
            optimizer = LARS(groups, **options)
        case c.LAMB():
            optimizer = LAMB(groups, **options)
    for group in optimizer.param_groups:
        group["base_lr"] = config.lr
    return optimizer


def _can_fuse(p: Tensor) -> bool:
    return p.device.type in ("cpu", "cuda") and p.dtype.is_floating_point


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to `base_lr` times the schedule's factor for the coming step.

    A rate held as a tensor is written in place, so that a captured graph sees it.
    """
    for group in optimizer.param_groups:
        lr = group["base_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def trust_ratios(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    """The last step's trust ratio of each adapted parameter, by name; {} for other optimizers.

    Reads the device once for each bucket, so call it when logging, not every step.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    ratios = {}
    for params, values in getattr(optimizer, "last_ratios", []):
        for p, value in zip(params, values.tolist(), strict=True):
            ratios[names[p]] = value
    return ratios
