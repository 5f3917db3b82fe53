"""Which parameters decay and adapt: by the type of the module that owns them."""

from collections.abc import Iterator
from typing import Any

import timm.layers as tl
import torch
from torch import nn

# Layers whose parameters are scales and shifts of normalised activations. Decaying them has
# no regularising meaning, and a layer-wise rate computed from their norm is noise.
# Subclasses count: timm's LayerNorm2d, BatchNormAct2d, GroupNormAct and the like.
NORM_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    tl.RmsNorm,
    tl.RmsNorm2d,
    tl.RmsNormAct2d,
    tl.GlobalResponseNorm,
    tl.EvoNorm2dB0,
    tl.EvoNorm2dS0,
    tl.FilterResponseNormAct2d,
    tl.LayerScale,
    tl.LayerScale2d,
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
