"""Geometry on the device: crop, flip and affine map of each image as one resampling.

torch's grid_sample rather than kornia's warp_affine, which inverts each matrix on the device
and waits for the result.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.data.batch import MicroBatch
from bigbatch.data.geometry import Matrices, to_theta

# Above this many source pixels per output pixel, bilinear sampling skips pixels.
MAX_SHRINK = 1.3


def warp(batch: MicroBatch, matrices: Matrices, out: int, device: torch.device) -> Tensor:
    """Images [B, C, out, out] in [0, 1], pixel by pixel from where the matrices say.

    All on the finest grid that one of them needs.
    To be called outside autocast: a grid in bfloat16 is off by parts of a pixel.
    """
    canvas = batch.canvas(device)
    height, width = canvas.shape[1:3]
    theta = to_theta(matrices, out, (height, width))
    finer = int(finer_grids(matrices).max(initial=1))
    canvas = canvas.permute(0, 3, 1, 2).float().div_(255)
    grid = sampling_grid(_put(torch.from_numpy(theta), device), out * finer)
    # Beyond an image's own edge (which lies inside the canvas) its edge is repeated.
    size = np.array([width, height])
    last = torch.from_numpy((2 * batch.sizes.numpy()[:, ::-1] - 1) / size - 1).float()
    first = torch.tensor([1 / width - 1, 1 / height - 1])
    grid = torch.maximum(grid, _put(first, device))
    grid = torch.minimum(grid, _put(last, device)[:, None, None])
    images = F.grid_sample(canvas, grid, mode="bilinear", align_corners=False)
    return F.avg_pool2d(images, finer) if finer > 1 else images


def finer_grids(matrices: Matrices) -> npt.NDArray[np.int64]:
    """How many times as fine a grid as the output's each image needs, [B].

    Antialiasing: the finer grid is sampled, then averaged. 1 in almost every training batch.
    """
    shrink = np.linalg.norm(matrices[:, :2, :2], axis=1).max(axis=1)
    return np.where(shrink > MAX_SHRINK, shrink.round(), 1).astype(np.int64)


def sampling_grid(theta: Tensor, out: int) -> Tensor:
    """Where maps [B, 2, 3] lead the centres of [out, out] pixels: [B, out, out, 2] as (x, y).

    torch's affine_grid (align_corners=False), term by term. That one multiplies matrices, in
    TF32 or bfloat16 wherever a switch of the process or the environment says so for products.
    """
    centres = torch.linspace(-1, 1, out, device=theta.device) * (out - 1) / out
    x, y = centres[None, None, :, None], centres[None, :, None, None]
    across, down, shift = theta[:, None, None].unbind(-1)  # each [B, 1, 1, 2]
    return (across * x + down * y).add_(shift)


def _put(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
