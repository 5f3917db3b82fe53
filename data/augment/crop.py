"""Crops on the host: on CPUs, warping whole canvases would take most of the time."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.configs.size import Size, height_width
from bigbatch.data.augment.memory import Memory
from bigbatch.data.batch import MicroBatch
from bigbatch.data.geometry import Boxes

WIDENED = 1.02  # times its side, that a crop may be once it is widened to whole pixels
LEAST_PIXEL = 1e-6  # of a pixel, that does not count as one: what arithmetic may have added


def crop_resize(
    batch: MicroBatch,
    boxes: Boxes,
    out: Size,
    mirrored: npt.NDArray[np.bool_] | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """Each image's box [left, top, width, height] in [0, 1]: float32 [B, C, *out].

    Boxes are widened to whole pixels; `mirrored` [B] ones come left to right. Bilinear,
    antialiased as Pillow does it: torch has vector code for just this, on uint8, which is
    faster than decoding a small JPEG.
    """
    size = height_width(out)
    result = (memory or Memory()).empty(len(boxes), batch.channels, *size)
    flips = np.zeros(len(boxes), bool) if mirrored is None else mirrored
    first, last = (corners.tolist() for corners in _whole_pixels(boxes))
    for place, image, (left, top), (right, bottom), flip in zip(
        result, batch.images(), first, last, flips.tolist(), strict=True
    ):
        # Copied first: torch's vector code takes only what has no gaps, and its own copy of
        # the part is slower.
        part = image[top:bottom, left:right].contiguous().permute(2, 0, 1)[None]
        small = F.interpolate(part, size=size, mode="bilinear", antialias=True)[0]
        torch.div(small.flip(2) if flip else small, 255, out=place)
    return result


def nearly_whole(boxes: Boxes) -> npt.NDArray[np.bool_]:
    """For which boxes [B] widening to whole pixels changes no side by more than 2 %: `WIDENED`."""
    first, last = _whole_pixels(boxes)
    whole: npt.NDArray[np.bool_] = np.logical_and.reduce(last - first <= WIDENED * boxes[:, 2:], 1)
    return whole


def _whole_pixels(boxes: Boxes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where the widened boxes begin and end, each [B, 2] (x, y)."""
    first = np.floor(boxes[:, :2] + LEAST_PIXEL).astype(np.int64)
    return first, np.ceil(boxes[:, :2] + boxes[:, 2:] - LEAST_PIXEL).astype(np.int64)
