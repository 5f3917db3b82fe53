"""Colour, each image by factors of its own; the arithmetic of jitter is kornia's."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from bigbatch.configs.augment import Augment, Jitter
from bigbatch.data.augment.operation import Draws, Operation, on_rows, per_image

_LEAST = 1e-8  # below any difference of colours that counts


def operations(augment: Augment) -> list[Operation]:
    """What the recipe asks for, in the order in which it is done."""
    found = []
    if augment.jitter is not None:
        import kornia.enhance  # noqa: F401  # half a second; and not first by threads that compute

        found.append(Operation("jitter", partial(jitter, config=augment.jitter)))
    return found


def jitter(images: Tensor, draws: Draws, config: Jitter) -> Tensor:
    """Brightness, contrast, saturation and hue, each with its own factor per image."""
    spread = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    signed = draws.uniforms(4, len(images)) * 2 - 1
    light, *others = (signed * spread[:, None]).astype(np.float32)
    every = np.arange(len(images))
    if config.contrast and images.shape[1] == 3:
        lumas = images.new_empty((len(images), 1, *images.shape[2:]))
        images = on_rows(images, every, partial(_brightness, config=config), light, lumas)
        # Of the whole batch: threads would share one image's sum, and its bits depend on how.
        means = lumas.mean((-2, -1), True)
    else:
        if config.brightness:
            images = on_rows(images, every, partial(_brightness, config=config), light)
        means = images.mean((-3, -2, -1), True) if config.contrast else images[:, :1, :1, :1]
    return on_rows(images, every, partial(_after_brightness, config=config), *others, means)


def _gray(images: Tensor) -> Tensor:
    from kornia.color import rgb_to_grayscale

    gray: Tensor = rgb_to_grayscale(images)
    return gray


def _brightness(
    images: Tensor, shifts: Tensor, lumas: Tensor | None = None, *, config: Jitter
) -> Tensor:
    """kornia's adjust_brightness_accumulative. What it gives is still in the cache: so its luma,
    which contrast needs, is written into `lumas` here."""
    if config.brightness:
        images.mul_(per_image(1 + shifts)).clamp_(0, 1)
    if lumas is not None:
        lumas.copy_(_gray(images))
    return images


def _after_brightness(
    images: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor, means: Tensor, config: Jitter
) -> Tensor:
    if config.contrast:  # kornia's adjust_contrast_with_mean_subtraction, its means given
        factors = per_image(1 + contrast)
        images.mul_(factors).add_(means * (1 - factors)).clamp_(0, 1)
    if config.saturation and images.shape[1] == 3:  # its adjust_saturation_with_gray_subtraction
        factors = per_image(1 + saturation)
        gray = _gray(images).mul_(1 - factors)
        images.mul_(factors).add_(gray).clamp_(0, 1)
    if config.hue:
        from kornia.enhance import adjust_hue

        images = adjust_hue(images, hue * (2 * torch.pi))
    return images


def hsv(images: Tensor, turns: Tensor, saturations: Tensor, values: Tensor) -> Tensor:
    """Hue shifted by turns [B], saturation and value times factors [B].

    The hexcone of Smith 1978, as Python's colorsys; without kornia's tables, which take four
    times as long.
    """
    red, green, blue = images.unbind(1)  # each [B, H, W]
    value, lowest = images.amax(1), images.amin(1)
    chroma = value - lowest
    width = chroma.clamp_min(_LEAST)
    sixths = torch.where(
        value == red,
        (green - blue) / width,
        torch.where(value == green, (blue - red) / width + 2, (red - green) / width + 4),
    )
    sixths += 6 * turns[:, None, None]
    saturation = chroma.div_(value.clamp_min(_LEAST)).mul_(saturations[:, None, None])
    value = value.mul_(values[:, None, None]).clamp_(0, 1)
    less = saturation.clamp_(0, 1).mul_(value)
    for place, corner in zip(images.unbind(1), (5, 3, 1), strict=True):
        k = (sixths + corner).remainder_(6)
        share = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.addcmul(value, share, less, value=-1, out=place)
    return images


def shift_channels(images: Tensor, shifts: Tensor) -> Tensor:
    """shifts [B, C] added to the channels."""
    return images.add_(shifts[:, :, None, None]).clamp_(0, 1)
