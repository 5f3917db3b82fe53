"""Where each output pixel comes from: crops, flips and small affine maps as one matrix.

All coordinates are continuous: pixel i covers [i, i + 1], so its centre is i + 0.5. A
matrix maps points of the output square, [0, out] x [0, out], to points of the source
image, as (x, y, 1). Drawn in NumPy from keyed uniforms, so that a decoding worker and the
training device see the same crop, whatever the hardware.
"""

import numpy as np
import numpy.typing as npt

from bigbatch.configs.schema import Affine, Crop
from bigbatch.data.rng import uniforms

Matrices = npt.NDArray[np.float64]  # [B, 3, 3]
Boxes = npt.NDArray[np.float64]  # [B, 4]: left, top, width, height in source pixels
_CROP_TRIES = 10


def centre_boxes(sizes: npt.NDArray[np.integer], fraction: float) -> Boxes:
    """The centred square whose side is `fraction` of the short side; sizes [B, 2] (h, w)."""
    height, width = sizes[:, 0].astype(float), sizes[:, 1].astype(float)
    side = np.minimum(height, width) * fraction
    return np.stack([(width - side) / 2, (height - side) / 2, side, side], axis=1)


def random_boxes(crop: Crop, sizes: npt.NDArray[np.integer], *key: int | str) -> Boxes:
    """Random resized crops (Szegedy et al. 2015): area and log aspect ratio uniform.

    Up to ten draws each, as torchvision's RandomResizedCrop makes; where none fits into the
    image, the largest centred box with the nearest allowed aspect ratio.
    """
    height, width = sizes[:, :1].astype(float), sizes[:, 1:].astype(float)
    draw = uniforms((len(sizes), _CROP_TRIES, 4), *key, "crop")
    area = height * width * (crop.scale[0] + draw[..., 0] * (crop.scale[1] - crop.scale[0]))
    low, high = np.log(crop.ratio)
    ratio = np.exp(low + draw[..., 1] * (high - low))
    w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)  # [B, tries]
    fits = (w <= width) & (h <= height)
    first = fits.argmax(axis=1)
    rows = np.arange(len(sizes))
    w, h, u, v = w[rows, first], h[rows, first], draw[rows, first, 2], draw[rows, first, 3]
    boxes = np.stack([u * (width[:, 0] - w), v * (height[:, 0] - h), w, h], axis=1)
    return np.where(fits.any(axis=1)[:, None], boxes, _largest_boxes(crop, height, width))


def _largest_boxes(crop: Crop, height: Matrices, width: Matrices) -> Boxes:
    ratio = np.clip(width / height, *crop.ratio)
    w, h = np.minimum(width, height * ratio), np.minimum(height, width / ratio)
    return np.concatenate([(width - w) / 2, (height - h) / 2, w, h], axis=1)


def box_matrices(boxes: Boxes, out: int) -> Matrices:
    """Maps that stretch each box over the whole output square of side `out`."""
    left, top, width, height = boxes.T
    matrices = np.zeros((len(boxes), 3, 3))
    matrices[:, 0, 0], matrices[:, 0, 2] = width / out, left
    matrices[:, 1, 1], matrices[:, 1, 2] = height / out, top
    matrices[:, 2, 2] = 1
    return matrices


def affine_matrices(
    affine: Affine | None, flip: float, count: int, out: int, *key: int | str
) -> Matrices:
    """Random flips and small affine maps of the output square about its centre."""
    matrices = np.tile(np.eye(3), (count, 1, 1))
    if affine is not None:
        signed = uniforms((6, count), *key, "affine") * 2 - 1
        angle, shear = np.deg2rad(signed[0] * affine.degrees), np.deg2rad(signed[1] * affine.shear)
        zoom = 1 + signed[2] * affine.scale
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        matrices[:, 0, 0], matrices[:, 0, 1] = cos, cos * np.tan(shear) - sin
        matrices[:, 1, 0], matrices[:, 1, 1] = sin, sin * np.tan(shear) + cos
        matrices[:, 0, 2] = signed[3] * affine.translate * out
        matrices[:, 1, 2] = signed[4] * affine.translate * out
    if flip > 0:
        mirrored = uniforms((count,), *key, "flip") < flip
        matrices[mirrored, :, 0] *= -1
    centre = np.array([[1, 0, out / 2], [0, 1, out / 2], [0, 0, 1]])
    back = np.array([[1, 0, -out / 2], [0, 1, -out / 2], [0, 0, 1]])
    return centre @ matrices @ back


def to_theta(
    matrices: Matrices, out: int, canvas: tuple[int, int]
) -> tuple[npt.NDArray[np.float32], float]:
    """Normalised [B, 2, 3] maps for `affine_grid`, and the largest shrink factor among them.

    `canvas` is (height, width) of the padded source. torch's grids run over [-1, 1] from
    edge to edge (align_corners=False).
    """
    height, width = canvas
    source = np.array([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]])
    output = np.array([[out / 2, 0, out / 2], [0, out / 2, out / 2], [0, 0, 1]])
    shrink = float(np.linalg.norm(matrices[:, :2, :2], axis=1).max()) if len(matrices) else 1.0
    return (source @ matrices @ output)[:, :2].astype(np.float32), shrink
