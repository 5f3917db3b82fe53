"""Rectangles of images replaced by a colour or by noise."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bigbatch.configs.augment_ops import Cutout, Erasing
from bigbatch.configs.size import Size, height_width
from bigbatch.data.augment.operation import Draws

Rectangles = npt.NDArray[np.int64]  # [B, n, 4]: left, top, right, bottom in pixels
_TRIES = 10


def erasing_rectangles(config: Erasing, draws: Draws, count: int, size: Size) -> Rectangles:
    """Of area and ratio as timm's RandomErasing draws them; empty where none of ten fits."""
    rows, columns = height_width(size)
    shape = (count, config.count, _TRIES)
    u = draws.uniforms(5, *shape)  # the first is for p
    low, high = config.area
    area = rows * columns * (low + u[1] * (high - low)) / config.count
    ratio = np.exp(np.log(config.ratio[0]) + u[2] * np.log(config.ratio[1] / config.ratio[0]))
    height, width = (np.rint(np.sqrt(x)).astype(np.int64) for x in (area * ratio, area / ratio))
    fits = (height < rows) & (width < columns) & (height > 0) & (width > 0)
    left = np.floor(u[3] * (columns - width + 1)).astype(np.int64)
    top = np.floor(u[4] * (rows - height + 1)).astype(np.int64)
    tries = np.stack([left, top, left + width, top + height], -1)  # [B, n, tries, 4]
    first = fits.argmax(2)[..., None, None]
    chosen = np.take_along_axis(tries, first, 2)[:, :, 0]
    return np.where(fits.any(2)[..., None], chosen, 0)


def cutout_rectangles(config: Cutout, draws: Draws, count: int, size: Size) -> Rectangles:
    """Squares about any pixel, cut off at the edges."""
    ends = np.array(height_width(size)[::-1])[:, None]  # [2 (x, y), 1]
    centre = np.floor(draws.uniforms(3, count)[1:] * ends).astype(np.int64)  # the first is for p
    corner = centre - config.size // 2  # [2 (x, y), B]
    edges = np.concatenate([corner, corner + config.size]).clip(0, np.tile(ends, (2, 1)))
    return edges.T[:, None]


def erase(images: Tensor, rectangles: Tensor, fill: Tensor) -> Tensor:
    """`fill`, [C, 1, 1] or images [B, C, H, W], inside rectangles [B, n, 4]."""
    if images.device.type == "cpu":
        for image, filled, each in zip(
            images, fill.expand_as(images), rectangles.tolist(), strict=True
        ):
            for left, top, right, bottom in each:
                image[:, top:bottom, left:right] = filled[:, top:bottom, left:right]
        return images
    y, x = (torch.arange(n, device=images.device) for n in images.shape[2:])
    left, top, right, bottom = rectangles[..., None].unbind(2)  # each [B, n, 1]
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)  # [B, n, H], [B, n, W]
    inside = (rows[..., None] & columns[:, :, None]).any(1, keepdim=True)  # [B, 1, H, W]
    return torch.where(inside, fill, images)
