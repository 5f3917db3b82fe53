"""What LARS and LAMB share: norms of whole layers and the ratios made of them.

Everything stays on the device and is computed for all layers at once; no value is read
back by the host.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def by_kind(group: dict[str, Any]) -> list[list[torch.nn.Parameter]]:
    """The group's parameters that have a gradient, listed by (device, dtype) for foreach."""
    lists: dict[tuple[torch.device, torch.dtype], list[torch.nn.Parameter]] = {}
    for parameter in group["params"]:
        if parameter.grad is not None:
            lists.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(lists.values())


def as_state(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in the precision of the state: fp32 for half-precision ones."""
    half = tensors[0].dtype in (torch.float16, torch.bfloat16)
    return [t.float() for t in tensors] if half else tensors


def state_of(
    optimizer: Optimizer, parameters: list[torch.nn.Parameter], name: str
) -> tuple[list[Tensor], bool]:
    """The named state of each parameter, made of zeros where missing; True where it was."""
    fresh = False
    for parameter in parameters:
        if name not in optimizer.state[parameter]:
            half = parameter.dtype in (torch.float16, torch.bfloat16)
            optimizer.state[parameter][name] = torch.zeros_like(
                parameter, dtype=torch.float32 if half else None
            )
            fresh = True
    return [optimizer.state[p][name] for p in parameters], fresh


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor, as one vector [layers] on the device."""
    return torch.stack(torch._foreach_norm(tensors))


def ratio_or_one(numerator: Tensor, denominator: Tensor, valid: Tensor) -> Tensor:
    """numerator / denominator where `valid`, otherwise 1: a layer of zeros is left alone."""
    safe = torch.where(valid, denominator, torch.ones_like(denominator))
    return torch.where(valid, numerator / safe, torch.ones_like(numerator))
