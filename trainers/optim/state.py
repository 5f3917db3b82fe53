"""Optimizer state by parameter name: the form that checkpoints store."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

# Optimizers of pytorch_optimizer count their steps in the group.
_GROUP_STATE = ("step",)
# L-BFGS's: room for the numbers of one direction, filled anew for each.
_SCRATCH = ("al",)
_LISTED = re.compile(r"(\w+)\[(\d+)\]")  # KEY[i], a list's element


def optimizer_state_by_name(
    optimizer: torch.optim.Optimizer, model: nn.Module | Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, JsonValue]]:
    """All optimizer state, as (tensors, scalars) keyed ``STATE/PARAM.NAME``.

    The names are those of `model`, or given for each tensor.

    Tensors are detached and contiguous, ready for safetensors, and keep dtype and device;
    those that alias the optimizer's own are not copied. Scalars hold the rest as JSON,
    including the counters that an optimizer keeps per group (``STATE/group.N``). Settings
    such as weight decay are not state: the recipe holds them.
    """
    tensors, scalars = own_state(optimizer, _names(optimizer, model))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, scalars


def own_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, JsonValue]]:
    """The same with the optimizer's own tensors, in whatever memory format."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, JsonValue] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            full = f"{key}/{names[parameter]}"
            if key in _SCRATCH:
                continue
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                for i, part in enumerate(value):
                    tensors[f"{key}[{i}]/{names[parameter]}"] = part.detach()
            elif isinstance(value, Tensor):
                tensors[full] = value.detach()
            else:
                scalars[full] = _plain(full, value)
    for index, group in enumerate(optimizer.param_groups):
        for key in group.keys() & set(_GROUP_STATE):
            scalars[f"{key}/group.{index}"] = _plain(key, group[key])
    return tensors, scalars


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module | Mapping[Tensor, str],
    tensors: dict[str, Tensor],
    scalars: dict[str, JsonValue],
) -> None:
    """Put back what `optimizer_state_by_name` returned, bit for bit, replacing all state.

    Tensors go to their parameter's device (step counters where the optimizer wants them)
    and take its memory layout; the dtype stays as stored. Raises ValueError where a name or
    a shape does not belong to the model.
    """
    parameters = {name: p for p, name in _names(optimizer, model).items()}
    groups = {p: g for g in optimizer.param_groups for p in g["params"]}
    optimizer.state.clear()
    listed: dict[tuple[Tensor, str], dict[int, Any]] = {}  # values that are lists of tensors
    for full, value in (tensors | scalars).items():
        key, _, name = full.partition("/")
        if not isinstance(value, Tensor) and name.startswith("group."):
            optimizer.param_groups[int(name.removeprefix("group."))][key] = value
            continue
        if name not in parameters:
            raise ValueError(f"optimizer state {full!r} belongs to no parameter of the model")
        p = parameters[name]
        if isinstance(value, Tensor):
            value = _place(value, p, key, groups[p])
        place = _LISTED.fullmatch(key)
        if place is None:
            optimizer.state[p][key] = value
        else:
            listed.setdefault((p, place[1]), {})[int(place[2])] = value
    for (p, key), parts in listed.items():
        optimizer.state[p][key] = [parts[i] for i in range(len(parts))]


def _place(value: Tensor, p: Tensor, key: str, group: dict[str, Any]) -> Tensor:
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return value.to("cpu", copy=True)  # torch reads such a counter on the host each step
    if value.shape == p.shape:
        new = torch.empty_like(p, dtype=value.dtype, memory_format=torch.preserve_format)
        return new.copy_(value)
    return value.to(p.device, copy=True)


def parameter_names(model: nn.Module | Mapping[Tensor, str]) -> Mapping[Tensor, str]:
    """The name of each parameter: the model's own, or a mapping as it is."""
    if isinstance(model, nn.Module):
        return {p: name for name, p in model.named_parameters()}
    return model


def _names(
    optimizer: torch.optim.Optimizer, model: nn.Module | Mapping[Tensor, str]
) -> Mapping[Tensor, str]:
    names = parameter_names(model)
    for group in optimizer.param_groups:
        assert all(p in names for p in group["params"]), "optimizer and model do not match"
    return names


def _plain(key: str, value: Any) -> JsonValue:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(key, v) for v in value]
    raise TypeError(f"optimizer state {key!r} is a {type(value).__name__}: neither tensor nor JSON")
