"""From a recipe's optimizer to a torch.optim.Optimizer over the right parameter groups."""

from typing import Any

import torch
from torch import nn

from bigbatch.configs.optimizers import Optimizer
from bigbatch.trainers.optim.lamb import LAMB
from bigbatch.trainers.optim.lars import LARS

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights; and norm layers and biases, which take neither decay nor trust.

    Told apart by the type of the module that owns a parameter: names and dimensions mislead
    (`downsample.1` is a BatchNorm; a depthwise kernel has as few dimensions as any).
    """
    exempt = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS) or name == "bias":
                exempt.add(parameter)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trained if p not in exempt]
    others = [p for p in trained if p in exempt]
    groups = [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": 0.0, "adapt": False},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's trained parameters."""
    groups = parameter_groups(model, config.weight_decay)
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        optimizer = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov
        )
    elif config.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    elif config.name == "lars":
        optimizer = LARS(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            trust_coefficient=config.trust_coefficient,
            eps=config.eps,
            momentum_form=config.momentum_form,
            trust_clip=config.trust_clip,
        )
    else:
        optimizer = LAMB(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            bias_correction=config.bias_correction,
            trust_bounds=config.trust_bounds,
        )
    for group in optimizer.param_groups:
        group["base_lr"] = config.lr
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
