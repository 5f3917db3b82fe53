"""Models by timm name."""

import difflib
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.model import Model
from bigbatch.configs.schema import Recipe
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.rng import key64
from bigbatch.trainers.models.transfer import start_from
from bigbatch.trainers.models.weights_file import WeightsInfo, open_weights

# Arguments of timm.create_model that name weights, or a place for them.
_SOURCES = {"checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"}


def build_model(
    config: Model,
    *,
    classes: int,
    channels: int,
    seed: int,
    info: WeightsInfo | None = None,
    quiet: bool = False,
) -> nn.Module:
    """A timm model with fresh, pretrained or given weights; the same ones on every rank.

    `info` says what the run is for, to be compared with what given weights were trained for;
    what is loaded of them is said on the terminal, unless `quiet`. Raises UserError for an
    unknown name or option, and for weights that cannot be loaded.
    """
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"model.name = {config.name!r} is no timm model; {hint}"
            "timm.list_models() lists all of them"
        )
    options: dict[str, Any] = dict(config.options)
    if hidden := _SOURCES & options.keys():
        raise UserError(
            f"model.options holds {', '.join(sorted(hidden))}: where weights come from is said by "
            "model.checkpoint, model.pretrained and a tag in model.name, such as resnet50.a1_in1k"
        )
    there = open_weights(Path(config.checkpoint)) if config.checkpoint else None

    set_fused_attn()  # whatever TIMM_FUSED_ATTN says

    def create(pretrained: bool = False, **more: Any) -> nn.Module:
        torch.manual_seed(key64(seed, "init"))
        model: nn.Module = timm.create_model(
            config.name,
            pretrained=pretrained,
            num_classes=classes,
            in_chans=channels,
            **more,
            **options,
        )
        return model

    def finish(model: nn.Module) -> None:
        if config.stem == "small":
            _shrink_stem(model, config.name)

    notes: list[str] = []
    try:
        if config.checkpoint:
            model, notes = start_from(config.checkpoint, create, finish, classes, there, info)
        else:
            model = create(config.pretrained)
            finish(model)
    except UserError:
        raise
    except Exception as error:  # options go to any constructor, and weights are anything
        source = config.checkpoint or ("pretrained" if config.pretrained else "fresh")
        raise UserError(
            f"timm cannot build {config.name} ({source} weights, options {options}): {error}"
        ) from error
    for note in [] if quiet else notes:
        print(f"bigbatch: {config.checkpoint}: {note}", file=sys.stderr, flush=True)
    return model


def build_augmenter(recipe: Recipe, classes: int, device: torch.device) -> Augmenter:
    """What a recipe's model sees of images on a device, in training and in evaluation."""
    return Augmenter(
        recipe.augment,
        image_size=recipe.data.image_size,
        crop_fraction=recipe.evaluate.crop_fraction,
        classes=classes,
        seed=recipe.seed,
        device=device,
        memory_format=choose_memory_format(recipe.model, device),
    )


def choose_memory_format(model: Model, device: torch.device) -> torch.memory_format:
    """Of images and convolutions. On a CPU always NCHW: in NHWC torch 2.15 sums BatchNorm's
    gradients with errors up to 0.8 %, and some convolutions write beyond their memory."""
    last = model.channels_last and device.type == "cuda"
    return torch.channels_last if last else torch.contiguous_format


def _shrink_stem(model: nn.Module, name: str) -> None:
    """3x3 of stride 1 for the first convolution, nothing for the max-pooling after it."""
    first, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    if not isinstance(first, nn.Conv2d) or not isinstance(pool, nn.MaxPool2d):
        raise UserError(
            f"model.stem = small fits ResNets that start with one convolution and a max-pooling, "
            f"not {name}; leave stem at standard"
        )
    small = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = small, nn.Identity()
