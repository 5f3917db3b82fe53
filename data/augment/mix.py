"""Images mixed with others of their micro-batch.

The partners are a permutation: an image meets itself as often as chance has it, once in B.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bigbatch.configs.augment import Augment
from bigbatch.configs.size import Size, height_width
from bigbatch.data.augment.memory import Memory
from bigbatch.data.augment.operation import Draws, Mixing, per_image, size_of

Boxes = npt.NDArray[np.int64]  # [B, 4]: left, top, right, bottom in pixels; maybe empty
Partners = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]  # of each image; its own weight


def operations(augment: Augment, memory: Memory) -> list[Mixing]:
    """What the recipe asks for, in the order in which it is done."""
    if augment.mixup > 0 and augment.cutmix > 0:
        return [Mixing("mixture", partial(mixture, config=augment, memory=memory))]
    if augment.mixup > 0:
        return [Mixing("mixup", partial(mixup, alpha=augment.mixup, memory=memory))]
    if augment.cutmix > 0:
        return [Mixing("cutmix", partial(cutmix, alpha=augment.cutmix, memory=memory))]
    return []


def mixup(
    images: Tensor, targets: Tensor, draws: Draws, alpha: float, memory: Memory | None = None
) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) within the micro-batch, with one weight per image."""
    partner, weight = draw_mixup(draws, len(images), alpha)
    return _mix(images, targets, partner, weight, None, memory)


def cutmix(
    images: Tensor, targets: Tensor, draws: Draws, alpha: float, memory: Memory | None = None
) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019) within the micro-batch, with one box per image.

    A label's weight is the share of pixels that its image has, of the box as it was cut off.
    """
    partner, boxes = draw_cutmix(draws, len(images), alpha, size_of(images))
    weight = _left(boxes, size_of(images))
    return _mix(images, targets, partner, weight, boxes, memory)


def mixture(
    images: Tensor, targets: Tensor, draws: Draws, config: Augment, memory: Memory | None = None
) -> tuple[Tensor, Tensor]:
    """One of both for each image: cutmix for a share `mix_switch` of them, mixup for the rest."""
    count, size = len(images), size_of(images)
    switch = 0.5 if config.mix_switch is None else config.mix_switch
    cut = draws.uniforms(count) < switch
    partner, weight = draw_mixup(replace(draws, name="mixup"), count, config.mixup)
    other, boxes = draw_cutmix(replace(draws, name="cutmix"), count, config.cutmix, size)
    boxes[~cut] = 0
    weight = np.where(cut, _left(boxes, size), weight)
    return _mix(images, targets, np.where(cut, other, partner), weight, boxes, memory, cut)


def draw_mixup(draws: Draws, count: int, alpha: float) -> Partners:
    # A name of its own, from before operations had any: other partners would be other weights.
    partner = np.argsort(replace(draws, name="partner").uniforms(count))
    return partner, draws.generator().beta(alpha, alpha, count).astype(np.float32)


def draw_cutmix(
    draws: Draws, count: int, alpha: float, size: Size
) -> tuple[npt.NDArray[np.int64], Boxes]:
    """Partners, and boxes of the images' shape and 1 - lambda of their area about any pixel, cut
    off at the edges."""
    order, x, y = draws.uniforms(3, count)
    share = draws.generator().beta(alpha, alpha, count)
    ends = np.array(height_width(size)[::-1])  # (x, y)
    half = np.floor(ends * np.sqrt(1 - share)[:, None]).astype(np.int64) // 2
    centres = np.floor(np.stack([x, y], 1) * ends).astype(np.int64)
    boxes = np.concatenate([centres - half, centres + half], 1).clip(0, np.tile(ends, 2))
    return np.argsort(order), boxes


def _left(boxes: Boxes, size: Size) -> npt.NDArray[np.float32]:
    """The share of pixels outside each box."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    left: npt.NDArray[np.float32] = (1 - area / math.prod(height_width(size))).astype(np.float32)
    return left


def _mix(
    images: Tensor,
    targets: Tensor,
    partner: npt.NDArray[np.int64],
    weight: npt.NDArray[np.float32],
    boxes: Boxes | None,
    memory: Memory | None,
    cut: npt.NDArray[np.bool_] | None = None,
) -> tuple[Tensor, Tensor]:
    """Targets by weight [B]; images, too, where they are not `cut` (all are, where boxes come
    alone)."""
    if boxes is not None and cut is None:
        cut = np.ones(len(images), bool)
    other = torch.from_numpy(partner).to(images.device, non_blocking=True)
    own = torch.from_numpy(weight).to(images.device, non_blocking=True)
    mixed_targets = targets[other].mul_(1 - own[:, None])
    mixed_targets += own[:, None] * targets  # of 100,000 classes each copy takes megabytes
    if images.device.type == "cpu":  # image by image: each stays in the cache
        mixed = (memory or Memory()).empty(*images.shape)
        for i, (place, j, share) in enumerate(zip(mixed, partner.tolist(), own, strict=True)):
            if cut is not None and boxes is not None and cut[i]:
                left, top, right, bottom = boxes[i].tolist()
                place.copy_(images[i])
                place[:, top:bottom, left:right] = images[j, :, top:bottom, left:right]
            else:
                torch.mul(images[i], share, out=place)
                place.add_(images[j] * (1 - share))
        return mixed, mixed_targets
    share = per_image(own)
    if cut is not None and boxes is not None:
        share = torch.where(per_image(_put(cut, images)), 1 - _inside(boxes, images), share)
    return share * images + (1 - share) * images[other], mixed_targets


def _inside(boxes: Boxes, images: Tensor) -> Tensor:
    """1 inside each box, else 0: [B, 1, H, W]."""
    y, x = (torch.arange(n, device=images.device) for n in images.shape[2:])
    left, top, right, bottom = _put(boxes, images)[..., None].unbind(1)  # each [B, 1]
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    return (rows[:, None, :, None] & columns[:, None, None]).to(images.dtype)


def _put(values: npt.NDArray[np.generic], images: Tensor) -> Tensor:
    return torch.from_numpy(values).to(images.device, non_blocking=True)
