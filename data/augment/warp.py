"""Geometry on the device: crop, flip and affine map of each image as one resampling.

torch's grid_sample rather than kornia's warp_affine, which inverts each matrix on the device
and waits for the result.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.configs.size import Size, height_width
from bigbatch.data.augment.operation import size_of
from bigbatch.data.batch import MicroBatch
from bigbatch.data.geometry import Matrices, to_theta
from bigbatch.data.maps import HORIZON, jacobians

# Above this many source pixels per output pixel, bilinear sampling skips pixels.
MAX_SHRINK = 1.3
_EDGE_SLACK = 2e-4  # of a pixel: what float32 may have added to a grid


def warp(
    batch: MicroBatch,
    matrices: Matrices,
    out: Size,
    device: torch.device,
    border: str = "edge",
    fill: Tensor | None = None,
) -> Tensor:
    """Images [B, C, *out] in [0, 1], pixel by pixel from where the matrices say.

    All on the finest grid that one of them needs. Beyond an image is what `border` says: edge,
    reflect, or else `fill` [C].
    To be called outside autocast: a grid in bfloat16 is off by parts of a pixel.
    """
    canvas = batch.canvas(device)
    canvas_size = canvas.shape[1:3]
    theta = _put(
        torch.from_numpy(to_theta(matrices, out, (canvas_size[0], canvas_size[1]))), device
    )
    finer = int(finer_grids(matrices, out).max(initial=1))
    canvas = canvas.permute(0, 3, 1, 2).float().div_(255)
    height, width = height_width(out)
    grid = sampling_grid(theta, (height * finer, width * finer))
    images = sample(canvas, grid, batch.sizes.flip(1), border, fill)
    return F.avg_pool2d(images, finer) if finer > 1 else images


def warp_images(images: Tensor, theta: Tensor, fill: Tensor) -> Tensor:
    """Images [B, C, H, W], overwritten, resampled by maps of their own area: theta [B, 2, 3].

    Beyond them is `fill` [C, 1, 1], into which their edges run over one pixel, as torchvision's.
    """
    grid = sampling_grid(theta, size_of(images))
    found = F.grid_sample(images.sub_(fill), grid, mode="bilinear", align_corners=False)
    return torch.add(found, fill, out=images)


def shift_images(images: Tensor, pixels: float, dim: int, fill: Tensor) -> Tensor:
    """The same where each pixel comes from `pixels` further on along `dim`, of all images.

    Without a grid: a quarter of the time on a CPU.
    """
    whole = math.floor(pixels)
    part = pixels - whole
    found = _shifted(images, whole, dim, fill)
    return found.lerp_(_shifted(images, whole + 1, dim, fill), part) if part else found


def _shifted(images: Tensor, pixels: int, dim: int, fill: Tensor) -> Tensor:
    size = images.shape[dim]
    found, kept = torch.empty_like(images), max(size - abs(pixels), 0)
    first = 0 if pixels > 0 else size - kept  # of what is kept, in its new place
    found.narrow(dim, first, kept).copy_(images.narrow(dim, size - kept - first, kept))
    found.narrow(dim, 0 if first else kept, size - kept).copy_(fill)
    return found


def sample(canvas: Tensor, grid: Tensor, sizes: Tensor, border: str, fill: Tensor | None) -> Tensor:
    """Bilinear, at grid [B, h, w, 2 (x, y)] of [-1, 1] over canvas [B, C, H, W].

    Each image, of sizes [B, 2] (width, height) on the host, lies in the top left corner of its
    canvas. Beyond it is what `border` says: edge, reflect, or else `fill` [C].
    """
    whole = torch.tensor([canvas.shape[3], canvas.shape[2]], dtype=torch.float64)
    own = sizes.double()[:, None, None]  # [B, 1, 1, 2]
    device, beyond = grid.device, None
    if border == "reflect":
        size, half = _put(own.float(), device), _put(whole.float() / 2, device)
        pixels = (grid + 1) * half
        grid = (size - (pixels.remainder(2 * size) - size).abs()) / half - 1
    elif border != "edge":
        slack = _EDGE_SLACK / whole
        first, last = -1 - slack, 2 * own / whole - 1 + slack
        beyond = (grid < _put(first.float(), device)) | (grid > _put(last.float(), device))
    # Half a pixel within an image's own edge (which lies inside the canvas) its edge is repeated.
    grid = torch.maximum(grid, _put((1 / whole - 1).float(), device))
    grid = torch.minimum(grid, _put(((2 * own - 1) / whole - 1).float(), device))
    images = F.grid_sample(canvas, grid, mode="bilinear", align_corners=False)
    if beyond is not None:
        assert fill is not None
        images = torch.where(beyond.any(-1)[:, None], fill[:, None, None], images)
    return images


def finer_grids(matrices: Matrices, out: Size) -> npt.NDArray[np.int64]:
    """How many times as fine a grid as the output's each image needs, [B].

    Antialiasing: the finer grid is sampled, then averaged. 1 in almost every training batch.
    Of a perspective, what its centre needs.
    """
    height, width = height_width(out)
    slopes = jacobians(matrices, np.array([[width / 2], [height / 2]]))[:, 0]
    shrink = np.linalg.norm(slopes, axis=1).max(axis=1)
    return np.where(shrink > MAX_SHRINK, shrink.round(), 1).astype(np.int64)


def sampling_grid(theta: Tensor, out: Size) -> Tensor:
    """Where maps [B, 2, 3] or [B, 3, 3] lead the centres of pixels of an area of size `out`:
    [B, height, width, 2] as (x, y).

    torch's affine_grid (align_corners=False), term by term. That one multiplies matrices, in
    TF32 or bfloat16 wherever a switch of the process or the environment says so for products.
    """
    rows, columns = (_centres(side, theta.device) for side in height_width(out))
    x, y = columns[None, None, :, None], rows[None, :, None, None]
    across, down, shift = theta[:, None, None].unbind(-1)  # each [B, 1, 1, 2 or 3]
    if theta.shape[1] == 3:
        grid = (across * x + down * y).add_(shift)
        return grid[..., :2] / grid[..., 2:].clamp_min(HORIZON)
    # The same sums of pairs as complex numbers: a CPU adds those eight times as fast.
    pairs = [torch.view_as_complex(part.contiguous()) for part in (across * x, down * y, shift)]
    return torch.view_as_real((pairs[0] + pairs[1]).add_(pairs[2]))


@lru_cache(maxsize=16)
def _centres(out: int, device: torch.device) -> Tensor:
    """Of `out` pixels over [-1, 1]."""
    return torch.linspace(-1, 1, out, device=device) * (out - 1) / out


def _put(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
