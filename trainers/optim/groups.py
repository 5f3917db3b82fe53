"""Which parameters decay and adapt: by the type of the module that owns them."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from timm.layers import evo_norm, filter_response_norm, grn, layer_scale, norm, norm_act
from torch import nn


def _layers_of(*modules: ModuleType) -> tuple[type[nn.Module], ...]:
    """The nn.Module classes that Python modules define."""
    return tuple(
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
    )


# Layers whose parameters are scales and shifts of normalised activations. Decaying them has
# no regularising meaning, and a layer-wise rate computed from their norm is noise.
NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms of every dimension
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    *_layers_of(evo_norm, filter_response_norm, grn, layer_scale, norm, norm_act),
)


def is_bias(attribute: str) -> bool:
    """Whether a module's own attribute is a bias: bias, q_bias, in_proj_bias, bias_ih_l0."""
    return attribute == "bias" or attribute.startswith("bias_") or attribute.endswith("_bias")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, parameter, plain) of each trainable parameter, once, in the model's order.

    Plain parameters take neither weight decay nor a layer-wise rate: those of norm layers,
    biases of any module, and what the model itself names in `no_weight_decay()` (timm's
    position tables and tokens). A parameter shared by modules is plain if any of them says so.
    """
    excluded = _excluded_by_model(model)
    plain = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            if isinstance(module, NORM_LAYERS) or is_bias(attribute) or name in excluded:
                plain.add(parameter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, parameter in plain


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for a torch optimizer: weights, then plain parameters without decay.

    Each group carries `adapt`, which layer-wise optimizers read. Empty groups are left out.
    """
    weights: list[torch.Tensor] = []
    plain: list[torch.Tensor] = []
    for _, parameter, is_plain in named_parameters(model):
        (plain if is_plain else weights).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": plain, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def _excluded_by_model(model: nn.Module) -> set[str]:
    names = getattr(model, "no_weight_decay", None)
    return set(names()) if callable(names) else set()
