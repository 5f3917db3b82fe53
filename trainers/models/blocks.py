"""Attention at the end of stages, pooling before the classifier, activations: put into a model."""

from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, SqueezeExcite, activations
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

from bigbatch.configs import blocks as options
from bigbatch.configs.errors import UserError

# What a unit's activation is; what gates (Sigmoid, Hardsigmoid, Softmax) stays as it is.
_ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardtanh,  # ReLU6 too
    nn.LeakyReLU,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.ReLU,
    nn.SELU,
    nn.SiLU,
    nn.Softplus,
    nn.Tanh,
    activations.GELU,
    activations.GELUTanh,
    activations.HardMish,
    activations.HardSwish,
    activations.Mish,
    activations.QuickGELU,
    activations.Swish,
    activations.Tanh,
)


def swap_activations(model: nn.Module, kind: options.Activation, name: str) -> None:
    """Put torch's activation `kind`, by its defaults, in the place of each one that is a module."""
    found: dict[nn.Module, nn.Module] = {}  # one that serves several places still does
    for path, old in list(model.named_modules(remove_duplicate=False)):
        if isinstance(old, _ACTIVATIONS):
            if old not in found:
                found[old] = getattr(nn, kind)()
            model.set_submodule(path, found[old])
    if not found:
        raise UserError(
            f"model.activation: {name} has no activations that are modules; leave it out"
        )
    tensors = next(iter(model.parameters()), None)
    if tensors is not None:
        for new in found.values():
            new.to(tensors.device)


class ScSE(nn.Module):
    """x times the channels' excitation, plus x times the places' (arXiv:1803.02579)."""

    def __init__(self, channels: int, between: int) -> None:
        super().__init__()
        self.channel = SqueezeExcite(channels, rd_channels=between)
        self.place = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.channel(x) + x * self.place(x).sigmoid()
        return found


def add_attention(model: nn.Module, config: options.Attention, name: str) -> None:
    """Append attention to stages, whose own parameters keep their names."""
    stages = find_stages(model)
    if missing := [number for number in config.stages if number > len(stages)]:
        raise UserError(
            f"model.attention.stages = {config.stages}: {name} has {len(stages)} stages that end "
            f"in maps, so there is no {missing[0]}; name others, or leave model.attention out"
        )
    device = next(model.parameters()).device
    for number in config.stages:
        stage, channels = stages[number - 1]
        between = max(1, channels // config.reduction)
        block: nn.Module
        match config.name:
            case "se":
                block = SqueezeExcite(channels, rd_channels=between)
            case "cbam":
                block = CbamModule(channels, rd_channels=between)
            case "scse":
                block = ScSE(channels, between)
        stage.append(block.to(device))


def find_stages(model: nn.Module) -> list[tuple[nn.Sequential, int]]:
    """The rows of blocks that make a model's stages, and the channels of their maps.

    Of timm's models by its feature_info, but for their stems; of torchvision's ResNets.
    """
    from torchvision.models import ResNet

    if isinstance(model, ResNet):
        rows = [model.layer1, model.layer2, model.layer3, model.layer4]
        return [(row, _channels(row[0])) for row in rows]
    info: Any = getattr(model, "feature_info", None)
    found = []
    for entry in getattr(info, "info", info) or []:
        try:
            stage = model.get_submodule(entry["module"])
        except AttributeError:
            continue
        row = stage if isinstance(stage, nn.Sequential) else getattr(stage, "blocks", None)
        if isinstance(row, nn.Sequential) and len(row):
            found.append((row, int(entry["num_chs"])))
    return found


def _channels(block: Any) -> int:
    """Of what one of torchvision's residual blocks gives."""
    last = block.conv3 if hasattr(block, "conv3") else block.conv2
    return int(last.out_channels)


class GeneralisedMean(nn.Module):
    """[B, C, H, W] -> [B, C, 1, 1]."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, maps: Tensor) -> Tensor:
        return maps.clamp(min=1e-6).pow(self.p).mean((2, 3), keepdim=True).pow(1 / self.p)


class Mean(nn.Module):
    """[B, C, H, W] -> [B, C, 1, 1]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3), keepdim=True)


class Maximum(nn.Module):
    """[B, C, H, W] -> [B, C, 1, 1]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.amax((2, 3), keepdim=True)


class Stochastic(nn.Module):
    """[B, C, H, W] -> [B, C, 1, 1]; draws from torch's stream, which a micro-batch's key seeds."""

    def forward(self, maps: Tensor) -> Tensor:
        flat = maps.flatten(2)
        share = flat.detach().float().clamp(min=0)
        total = share.sum(2, keepdim=True)
        share = torch.where(total > 0, share / total.clamp(min=1e-30), 1 / flat.shape[2])
        if self.training:
            place = torch.multinomial(share.flatten(0, 1), 1).view(*flat.shape[:2], 1)
            return flat.gather(2, place)[..., None]
        return (share.to(flat) * flat).sum(2)[..., None, None]


class _Pooled(nn.Module):
    """A pooling in the place of another one, flattened to [B, C] where that was."""

    def __init__(self, pool: nn.Module, flatten: bool) -> None:
        super().__init__()
        self.pool = pool
        self.flatten = flatten

    def forward(self, maps: Tensor) -> Tensor:
        found: Tensor = self.pool(maps)
        return found.flatten(1) if self.flatten else found


def change_pool(model: nn.Module, config: options.Pool, name: str) -> None:
    """Put a pooling in the place of the model's last one to a single pixel."""
    pool = _pooling(config)
    found = [(path, m) for path, m in model.named_modules() if _is_global(m)]
    if not found:
        raise UserError(
            f"model.pool: {name} has no global pooling of maps [B, C, H, W] that is a module "
            "(timm's SelectAdaptivePool2d, torch's AdaptiveAvgPool2d to one pixel); leave it out"
        )
    path, old = found[-1]
    if isinstance(old, SelectAdaptivePool2d):
        flatten = isinstance(old.flatten, nn.Flatten) or bool(getattr(old.pool, "flatten", False))
        swapped: Any = old  # its attributes are typed by what it was built with
        swapped.pool, swapped.flatten = _Pooled(pool, flatten), nn.Identity()
    else:
        model.set_submodule(path, _Pooled(pool, flatten=False))


def _pooling(config: options.Pool) -> nn.Module:
    match config:
        case options.Average():
            return Mean()
        case options.Maximum():
            return Maximum()
        case options.GeneralisedMean():
            return GeneralisedMean(config.p)
        case options.Stochastic():
            return Stochastic()


def _is_global(module: nn.Module) -> bool:
    if isinstance(module, SelectAdaptivePool2d):
        maps_last = getattr(module.pool, "dim", (2, 3)) in ((2, 3), [2, 3])
        return maps_last and not module.is_identity() and module.feat_mult() == 1
    sizes: tuple[Any, ...] = (1, (1, 1), [1, 1])
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in sizes


def recompute(model: nn.Module, name: str) -> None:
    """Compute activations again in the backward pass rather than keep them (arXiv:1604.06174)."""
    if any(isinstance(module, nn.RReLU) for module in model.modules()):
        # torch's checkpoint stops before RReLU has written the slopes that it keeps for the
        # backward pass, which then reads whatever was in memory.
        raise UserError(
            "model.recompute gives RReLU wrong gradients in torch; leave it out, or take another "
            "model.activation"
        )
    turn_on = getattr(model, "set_grad_checkpointing", None)
    if not callable(turn_on):
        raise UserError(
            f"model.recompute: {name} does not say where to cut it (timm's "
            "set_grad_checkpointing); leave it out, or take a timm model"
        )
    try:
        turn_on(True)
    except AssertionError as error:
        why = str(error) or "it does not support that"
        raise UserError(f"model.recompute: {name}: {why}; leave it out") from None
