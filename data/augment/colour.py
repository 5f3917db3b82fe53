"""Colour, each image by factors of its own; the arithmetic is kornia's."""

from functools import partial

import kornia.enhance as enhance
import numpy as np
import torch
from torch import Tensor

from bigbatch.configs.augment import Augment, Jitter
from bigbatch.data.augment.operation import Draws, Operation


def operations(augment: Augment) -> list[Operation]:
    """What the recipe asks for, in the order in which it is done."""
    found = []
    if augment.jitter is not None:
        found.append(Operation("jitter", partial(jitter, config=augment.jitter)))
    return found


def jitter(images: Tensor, draws: Draws, config: Jitter) -> Tensor:
    """Brightness, contrast, saturation and hue, each with its own factor per image."""
    spread = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    signed = draws.uniforms(4, len(images)) * 2 - 1
    shift = torch.from_numpy((signed * spread[:, None]).astype(np.float32))
    shift = shift.to(images.device, non_blocking=True)
    if config.brightness:
        images = enhance.adjust_brightness_accumulative(images, 1 + shift[0])
    if config.contrast:
        images = enhance.adjust_contrast_with_mean_subtraction(images, 1 + shift[1])
    if config.saturation:
        images = enhance.adjust_saturation_with_gray_subtraction(images, 1 + shift[2])
    if config.hue:
        images = enhance.adjust_hue(images, shift[3] * (2 * torch.pi))
    return images
