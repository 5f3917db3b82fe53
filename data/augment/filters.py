"""Operations on neighbourhoods of pixels, [B, C, H, W] in [0, 1]."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.data.augment.operation import per_image


def blur(images: Tensor, sigmas: Tensor, largest: float) -> Tensor:
    """Gaussian of sigmas [B] in pixels; the kernel reaches 3 * `largest`, within the image."""
    reach = min(math.ceil(3 * largest), min(images.shape[2:]) - 1)
    places = torch.arange(reach + 1, device=images.device)
    weights = torch.exp(-0.5 * (places / sigmas[:, None]) ** 2)  # [B, 1 + reach]
    weights = weights / (2 * weights.sum(1, keepdim=True) - 1)
    # A few sums of shifted images: a CPU takes several times as long for such a convolution.
    for dim in (2, 3):
        padding = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
        padded = F.pad(images, padding, "reflect")
        size = images.shape[dim]
        images = padded.narrow(dim, reach, size) * per_image(weights[:, 0])
        for k in range(1, reach + 1):
            pair = padded.narrow(dim, reach - k, size) + padded.narrow(dim, reach + k, size)
            images.addcmul_(pair, per_image(weights[:, k]))
    return images


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
