"""Operations on the values of pixels, [B, C, H, W] in [0, 1]; they may overwrite their images.

Where steps of 1/255 decide, pixels are rounded to them first: on images of such steps the
results are Pillow's and torchvision's to the last one.
"""

import torch
from torch import Tensor

from bigbatch.data.augment.operation import per_image

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow, torchvision and kornia


def luma(images: Tensor) -> Tensor:
    """[B, 1, H, W] of [B, 3, H, W]; one channel is its own."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Times factors [B]: 0 is black."""
    return images.mul_(per_image(factors)).clamp_(0, 1)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """From the mean of the luma by factors [B]: 0 is that gray."""
    # In two steps: threads would share the sum of one image, and its bits depend on how.
    gray = luma(images).mean(3).mean((1, 2))
    shift = per_image(gray * (1 - factors))
    return images.mul_(per_image(factors)).add_(shift).clamp_(0, 1)


def color(images: Tensor, factors: Tensor) -> Tensor:
    """From the luma by factors [B]: 0 is without colour. One channel has none."""
    if images.shape[1] == 1:
        return images
    gray = luma(images).mul_(1 - per_image(factors))
    return images.mul_(per_image(factors)).add_(gray).clamp_(0, 1)


def grayscale(images: Tensor) -> Tensor:
    return luma(images).expand_as(images)


def invert(images: Tensor) -> Tensor:
    return images.neg_().add_(1)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Inverted where 255 times the pixel is at or above thresholds [B]."""
    bright = images.clone().ge_(per_image((thresholds.ceil() - 0.5) / 255))
    return images.addcmul_(bright, torch.rsub(images, 1, alpha=2))


def solarize_add(images: Tensor, added: Tensor) -> Tensor:
    """added [B], of 255, on pixels below 128."""
    dark = images.clone().lt_(127.5 / 255)
    return images.addcmul_(dark, per_image(added / 255)).clamp_(0, 1)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The highest bits [B] of 8; from none, black, to all."""
    step = per_image(torch.exp2(8 - bits))
    return images.mul_(255 / step).add_(0.5 / step).floor_().mul_(step).div_(255)


def autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched over [0, 1], unless it has one value only."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    width = high - low
    flat = width == 0
    return images.sub_(low.masked_fill(flat, 0)).div_(width.masked_fill(flat, 1))


def equalize(images: Tensor) -> Tensor:
    """Histogram equalisation of each channel: Pillow's ImageOps.equalize, in its integers."""
    planes, pixels = images.shape[0] * images.shape[1], images.shape[2] * images.shape[3]
    steps = images.mul_(255).round_().view(planes, pixels).to(torch.int32)
    counts = _histograms(steps)  # [P, 256]
    before = counts.cumsum(1) - counts
    step = (before * (counts > 0)).amax(1, keepdim=True) // 255  # all pixels but the last shade's
    table = ((before + step // 2) // step.clamp_min(1)).clamp_(max=255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table)
    shades = table.float().div_(255).view(-1)
    offsets = torch.arange(planes, dtype=torch.int32, device=images.device).mul_(256)
    places = steps.add_(offsets[:, None])
    return shades.index_select(0, places.view(-1)).view(images.shape)


def _histograms(steps: Tensor) -> Tensor:
    """How often each of 0..255 occurs in each row of int32 [P, N]: int64 [P, 256]."""
    if steps.device.type == "cpu":  # which counts bytes twice as fast as longer integers
        return torch.stack([torch.bincount(row, minlength=256) for row in steps.to(torch.uint8)])
    counts = torch.zeros((len(steps), 256), dtype=torch.int64, device=steps.device)
    ones = torch.ones((), dtype=torch.int64, device=steps.device).expand_as(steps)
    return counts.scatter_add_(1, steps.long(), ones)  # of integers: in any order the same
