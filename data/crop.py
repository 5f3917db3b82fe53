"""Crops on the host: for training on CPUs, where warping whole canvases takes most of the time."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.data.geometry import Boxes
from bigbatch.data.loader import MicroBatch


def crop_resize(batch: MicroBatch, boxes: Boxes, out: int) -> Tensor:
    """Each image's box [left, top, width, height] in [0, 1]: float32 [B, C, out, out].

    Boxes are widened to whole pixels. Bilinear, antialiased as Pillow does it: torch has
    vector code for just this, on uint8, which is about as fast as decoding a small JPEG.
    """
    result = torch.empty(len(boxes), batch.channels, out, out)
    first = np.floor(boxes[:, :2] + 1e-6).astype(int).tolist()
    last = np.ceil(boxes[:, :2] + boxes[:, 2:] - 1e-6).astype(int).tolist()
    for place, image, (left, top), (right, bottom) in zip(
        result, batch.images(), first, last, strict=True
    ):
        part = image[top:bottom, left:right].permute(2, 0, 1)[None]
        small = F.interpolate(part, size=(out, out), mode="bilinear", antialias=True)
        torch.div(small[0], 255, out=place)
    return result
