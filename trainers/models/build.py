"""A recipe's model: its source, its parts, its weights."""

import sys
from pathlib import Path
from typing import Any

import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn

from bigbatch.configs.errors import UserError, reason_of
from bigbatch.configs.model import Model
from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import Size
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.rng import key64
from bigbatch.trainers.models.convert import check_output, convert, example_images, see_classifier
from bigbatch.trainers.models.initialise import initialise
from bigbatch.trainers.models.sources import find_source
from bigbatch.trainers.models.transfer import said_of_pretrained, start_from
from bigbatch.trainers.models.weights_file import WeightsInfo, open_weights
from bigbatch.trainers.planning.inputs import Inputs
from bigbatch.trainers.planning.targets import target_scaling


def build_model(
    config: Model,
    *,
    classes: int,
    channels: int,
    seed: int,
    image_size: Size | None = None,
    head_prior: Tensor | None = None,
    info: WeightsInfo | None = None,
    quiet: bool = False,
) -> nn.Module:
    """A recipe's model with fresh, pretrained or given weights; the same ones on every rank.

    `image_size` is in pixels; None where nothing depends on it, which only timm's and torchvision's
    models as they are promise. `head_prior` is the bias [C] that init.head_prior asks for.
    `info` says what the run is for, to be compared with what given weights were
    trained for; what is loaded of them is said on the terminal, unless `quiet`. Raises UserError
    for an unknown name or option, for a part that the model has no place for, and for weights that
    cannot be loaded.
    """
    there = open_weights(Path(config.checkpoint)) if config.checkpoint else None
    source = find_source(config, classes=classes, channels=channels, image_size=image_size)

    set_fused_attn()  # whatever TIMM_FUSED_ATTN says

    def create(*arguments: Any, **more: Any) -> nn.Module:
        torch.manual_seed(key64(seed, "init"))
        return source(*arguments, **more)

    def finish(model: nn.Module) -> None:
        if config.stem == "small":
            _shrink_stem(model, config.name)
        images = None if image_size is None else example_images(model, channels, image_size)
        if config.own and images is not None:
            see_classifier(model, images)
        convert(model, config, images)
        if config.beyond_timm() and images is not None:
            check_output(model, images, classes, config.name)

    notes: list[str] = []
    try:
        if config.checkpoint:
            model, notes = start_from(config.checkpoint, create, finish, classes, there, info)
        else:
            model = create(True) if config.pretrained else create()
            if config.pretrained and info is not None:
                notes = said_of_pretrained(model, info)
            finish(model)
    except UserError:
        raise
    except Exception as error:  # options go to any constructor, and weights are anything
        weights = config.checkpoint or ("pretrained" if config.pretrained else "fresh")
        what = f"timm cannot build {config.name}" if config.from_timm else f"{config.name} fails"
        told = f"{weights} weights, options {config.options}"
        raise UserError(f"{what} ({told}): {reason_of(error)}") from error
    if config.init is not None:
        initialise(model, config.init, seed, config.name, head_prior)
    for note in [] if quiet else notes:
        weights = config.checkpoint or f"pretrained {config.name}"
        print(f"bigbatch: {weights}: {note}", file=sys.stderr, flush=True)
    return model


def build_augmenter(
    recipe: Recipe, classes: int, device: torch.device, inputs: Inputs | None = None
) -> Augmenter:
    """What a recipe's model sees of images on a device, in evaluation and, of `inputs`, in
    training."""
    return Augmenter(
        recipe.augment,
        image_size=recipe.data.image_size,
        eval_size=recipe.eval_size,
        growth=() if inputs is None else inputs.sizes,
        strengths=None if inputs is None else inputs.strengths,
        crop_fraction=recipe.evaluate.crop_fraction,
        squash=recipe.evaluate.squash,
        classes=classes,
        seed=recipe.seed,
        device=device,
        memory_format=choose_memory_format(recipe.model, device),
        views=recipe.views > 1,
        scaling=target_scaling(recipe),
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
