"""Evaluation's view of an image as two products of matrices, for any height and width.

A crop that is resized is linear and separable: out = rows @ pixels @ columns^T. Written so, a
graph whose height and width are free holds it exactly, in operations that every runtime has.
onnxruntime's Resize rounds up to seven values in a hundred to another step, and is further off at
the edges by its defaults (findings/onnxruntime-resize-edges.sh).
"""

import torch
from torch import Tensor, nn

from bigbatch.configs.size import Size, height_width
from bigbatch.data.augment.crop import LEAST_PIXEL, WIDENED
from bigbatch.data.augment.warp import MAX_SHRINK

_SMALLEST_WHOLE = 2 / (WIDENED - 1)  # pixels: the side from which any crop counts as whole
_WEIGHT_BITS, _MOST_BITS = 15, 22  # of torch's kernel for uint8, and of Pillow's


class CentreCrop(nn.Module):
    """Pixels uint8 [N, H, W, C] -> images float32 [N, C, *out] in [0, 1].

    What `Augmenter.evaluate` gives on a CPU, before normalisation, for images of one size:
    `fraction`, of each side, of the largest centred box with the shape of `out`, or with `squash`
    of the whole image. Nearly all crops are widened
    to whole pixels, and resized as crop.py does it, in steps of 1/255; a small one that cannot
    be, by warp.py's bilinear sampling. Both are computed as weights [out, H] and [out, W],
    of which one pair is taken.
    """

    def __init__(self, out: Size, fraction: float, squash: bool = False) -> None:
        super().__init__()
        self.out, self.fraction, self.squash = height_width(out), fraction, squash

    def forward(self, pixels: Tensor) -> Tensor:
        # As tensors, positions know the size, whatever it will be when the graph is run.
        rows, columns = (_count(pixels.shape[axis], pixels.device) for axis in (1, 2))
        height, width = rows[-1] + 1, columns[-1] + 1
        box = self._box(height, width)  # height and width
        out, finer = self.out, self._finer(box)
        ways, whole = [], torch.ones((), dtype=torch.bool, device=pixels.device)
        for at, length, side, size in zip((rows, columns), (height, width), box, out, strict=True):
            start = (length - side) / 2
            first, last = _whole_pixels(start, side)
            whole = whole & (last - first <= WIDENED * side)
            sampled = self._sampling(at, start, side, size, finer)
            ways.append((self._resizing(at, first, last, size), sampled))
        vertical, horizontal = (torch.where(whole, *way).float() for way in ways)
        images = pixels.permute(0, 3, 1, 2).float()
        images = _rounded(images @ horizontal.T, whole)
        return _rounded(vertical @ images, whole) / 255

    def _box(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        if self.squash:
            return height * self.fraction, width * self.fraction
        aspect = self.out[1] / self.out[0]
        high, wide = torch.minimum(height, width / aspect), torch.minimum(height * aspect, width)
        return high * self.fraction, wide * self.fraction

    def _finer(self, box: tuple[Tensor, Tensor]) -> Tensor:
        """How many times as fine a grid as the output's is sampled, as `finer_grids` has it."""
        shrink = torch.maximum(box[0] / self.out[0], box[1] / self.out[1])
        return torch.where(shrink > MAX_SHRINK, torch.round(shrink), 1.0)

    def _resizing(self, at: Tensor, first: Tensor, last: Tensor, out: int) -> Tensor:
        """Weights [out, len(at)] of torch's antialiased bilinear interpolation of uint8.

        A triangle about each centre, as wide as an output pixel, cut at the crop's edges; in
        fixed point, with as many bits as keep the largest weight below 2^15.
        """
        scale = (last - first) / out
        centres = first + scale * (_count(out, at.device) + 0.5)
        weights = (1 - ((at + 0.5 - centres[:, None]) / scale.clamp(min=1)).abs()).clamp(min=0)
        weights = torch.where((at >= first) & (at < last), weights, 0.0)
        weights = weights / weights.sum(1, keepdim=True)
        units = 2.0 ** _count(_MOST_BITS + 1, at.device)
        unit = torch.where(0.5 + weights.max() * units < 2**_WEIGHT_BITS, units, 1.0).max()
        return torch.floor(weights * unit + 0.5) / unit

    def _sampling(self, at: Tensor, start: Tensor, side: Tensor, out: int, finer: Tensor) -> Tensor:
        """Weights [out, len(at)] of `warp`: a finer grid, sampled bilinearly, then averaged.

        `most` bounds how much finer, since only crops of a small side come here.
        """
        most = max(1, round(_SMALLEST_WHOLE / min(self.out)))
        shrink = side / out
        part = _count(most, at.device)
        cells = _count(out, at.device)[:, None] + (part + 0.5) / finer  # [out, most]
        points = (start + cells * shrink - 0.5).clamp(min=0)
        points = torch.minimum(points, at[-1])  # beyond the edge, it is repeated
        weights = (1 - (at - points[..., None]).abs()).clamp(min=0)
        return torch.where((part < finer)[:, None], weights, 0.0).sum(1) / finer


def _count(size: int, device: torch.device) -> Tensor:
    """0, 1, ... as float64, which places pixels as exactly as data/geometry.py does."""
    return torch.arange(size, dtype=torch.float64, device=device)


def _whole_pixels(start: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    return torch.floor(start + LEAST_PIXEL), torch.ceil(start + side - LEAST_PIXEL)


def _rounded(images: Tensor, whole: Tensor) -> Tensor:
    """As the kernel for uint8 stores them after each of its two passes."""
    return torch.where(whole, torch.floor(images + 0.5), images)
