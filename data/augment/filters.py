"""Operations on neighbourhoods of pixels, [B, C, H, W] in [0, 1]."""

import math

import kornia.filters as kornia
from torch import Tensor

from bigbatch.data.augment.operation import per_image


def blur(images: Tensor, sigmas: Tensor, largest: float) -> Tensor:
    """Gaussian of sigmas [B] in pixels; the kernel reaches 3 * `largest`, within the image."""
    reach = min(math.ceil(3 * largest), min(images.shape[2:]) - 1)
    size = 2 * reach + 1
    return kornia.gaussian_blur2d(images, (size, size), sigmas[:, None].expand(-1, 2))


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """From Pillow's SMOOTH by factors [B]: 0 is smoothed, 1 the image. Edges stay as they are."""
    rows = images[:, :, :-2] + images[:, :, 1:-1]
    rows += images[:, :, 2:]
    smooth = rows[..., :-2] + rows[..., 1:-1]
    smooth += rows[..., 2:]  # of the nine pixels; the middle one counts five times
    inner = images[:, :, 1:-1, 1:-1]
    smooth.add_(inner, alpha=4).mul_(per_image(1 - factors) / 13)
    inner.mul_(per_image(factors)).add_(smooth).clamp_(0, 1)
    return images
