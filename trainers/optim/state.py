"""Optimizer state by parameter name, the form in which checkpoints hold it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def optimizer_state_by_name(
    optimizer: Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under "STATE/PARAMETER.NAME", and plain values under the same kind of key."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            place = f"{key}/{names[parameter]}"
            if isinstance(value, Tensor):
                tensors[place] = value.detach().contiguous()
            elif value is not None:
                scalars[place] = value
    return tensors, scalars


def load_optimizer_state(
    optimizer: Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Put a saved state back, bit for bit, on the devices of the parameters."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for place, value in {**tensors, **scalars}.items():
        key, _, name = place.partition("/")
        parameter = parameters[name]
        if isinstance(value, Tensor):
            # torch keeps step counters on the host, except for capturable optimizers.
            value = value.clone() if key == "step" else value.to(parameter.device, copy=True)
        optimizer.state[parameter][key] = value
    assert all(isinstance(p, torch.nn.Parameter) for p in optimizer.state)
