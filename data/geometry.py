"""Where each output pixel comes from: crops, flips and maps (data/maps.py) as one matrix.

All coordinates are continuous: pixel i covers [i, i + 1], so its centre is i + 0.5. A
matrix maps points of the output, [0, width] x [0, height], to points of the source
image, as (x, y, 1). Drawn in NumPy from keyed uniforms, so that a decoding worker and the
training device see the same crop, whatever the hardware.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bigbatch.configs.size import Size, height_width
from bigbatch.data.maps import Map, apply_maps, draw_maps, is_affine, jacobians
from bigbatch.data.rng import uniforms

if TYPE_CHECKING:  # pydantic would double the time in which a decoding worker starts
    from bigbatch.configs.augment import Affine, Crop

Matrices = npt.NDArray[np.float64]  # [B, 3, 3]
Boxes = npt.NDArray[np.float64]  # [B, 4]: left, top, width, height in source pixels
Growth = tuple[tuple[int, Size], ...]  # first steps, rising from 0, and the size from each on
_CROP_TRIES = 10
_SLACK = 1e-6  # what arithmetic may have taken from a crop of just the right size
# Where the stored pixels of an image lie in it. It was reduced by `factor`, to the size of
# full / factor, rounded up; of that, the part whose corner is (left, top) is stored.
FRAME = np.dtype(
    [
        (name, "<i4")
        for name in ("height", "width", "full_height", "full_width", "factor", "left", "top")
    ]
)
Frames = npt.NDArray[np.void]  # [B], of dtype FRAME


@dataclass(frozen=True)
class View:
    """What a model of input size `out` sees of an image: a crop, flipped and warped.

    A pure function of an image's size, its place in a micro-batch, and (step, micro-batch):
    a decoding worker chooses the resolution by it, the trainer's device cuts by it.
    """

    out: Size
    fraction: float  # of the largest centre crop, that is taken where there is no `crop`
    crop: Crop | None = None
    affine: Affine | None = None
    flip: float = 0.0
    seed: int = 0
    place: tuple[float, float] = (0.5, 0.5)  # of the centre crop, from (0, 0), top left, to (1, 1)
    maps: tuple[Map, ...] = ()  # follow crop, affine and flip, in this order
    border: str = "edge"  # what shows beyond an image: edge, reflect, mean or black
    squash: bool = False  # the centre crop has the image's shape, not that of `out`
    growth: Growth = ()  # `out` by step, where it changes; `out` is the last one

    def at(self, step: int) -> View:
        """The view of one step."""
        if not self.growth:
            return self
        out = [size for first, size in self.growth if first <= step][-1]
        return replace(self, out=out, growth=())

    @property
    def is_random(self) -> bool:
        moves = self.affine is not None or bool(self.maps)
        return self.crop is not None or moves or 0 < self.flip < 1

    def boxes(self, sizes: npt.NDArray[np.integer], step: int, index: int) -> Boxes:
        """The crop of each image, sizes [B, 2] (h, w)."""
        if self.crop is None:
            return centre_boxes(sizes, self.fraction, self.place, None if self.squash else self.out)
        return random_boxes(self.crop, sizes, self.seed, step, index, out=self.out)

    def warps(self, count: int, step: int, index: int) -> Matrices:
        """The flips and maps of the output, which precede the crops."""
        key = (self.seed, step, index)
        matrices = affine_matrices(self.affine, self.flip, count, self.out, *key)
        for one in self.maps:
            matrices = matrices @ draw_maps(one, count, self.out, *key)
        return matrices

    def frames(
        self,
        sizes: npt.NDArray[np.integer],
        rows: npt.NDArray[np.integer],
        count: int,
        longest: int,
        step: int,
        index: int,
    ) -> Frames:
        """How to store the images at `rows` of `count`, whose sizes are [n, 2] (h, w).

        Each is reduced by 8, 4 or 2 where that leaves a source pixel for every output pixel,
        in whatever direction the warp is narrowest. An image that would still be longer than
        `longest` is stored as far as it is seen, and a pixel more for the interpolation.
        """
        if self.growth:
            return self.at(step).frames(sizes, rows, count, longest, step, index)
        everyone = np.ones((count, 2), np.int64)
        everyone[rows] = sizes
        boxes = self.boxes(everyone, step, index)[rows]
        maps = box_matrices(boxes, self.out) @ self.warps(count, step, index)[rows]
        height, width = height_width(self.out)
        ends = np.array([[0, width, 0, width], [0, 0, height, height]], float)
        slopes = jacobians(maps, ends)  # [n, 4, 2, 2]
        density = np.linalg.svd(slopes, compute_uv=False)[..., 1].min(1) * (1 + _SLACK)
        factor = 2 ** np.clip(np.floor(np.log2(density)), 0, 3).astype(np.int64)
        frames = whole_frames(sizes, factor)
        corners = apply_maps(maps, ends) / factor[:, None, None]  # [n, 2 (x, y), 4]
        largest = np.stack([frames["width"], frames["height"]], 1)
        low, high = corners.min(2), corners.max(2)
        if self.border == "reflect":  # what is mirrored must be there
            low, high = np.minimum(low, 2 * largest - high), np.maximum(high, -low)
        low, high = np.clip(low, -largest, 2 * largest), np.clip(high, -largest, 2 * largest)
        first = np.clip(np.floor(low).astype(np.int64) - 1, 0, largest - 1)
        last = np.clip(np.ceil(high).astype(np.int64) + 1, first + 1, largest)
        cut = largest.max(1) > longest
        frames["left"][cut], frames["top"][cut] = first[cut].T
        frames["width"][cut], frames["height"][cut] = (last - first)[cut].T
        return frames


def whole_frames(
    sizes: npt.NDArray[np.integer], factor: npt.NDArray[np.integer] | int = 1
) -> Frames:
    """Frames of whole images, sizes [B, 2] (h, w), reduced by `factor`."""
    frames = np.zeros(len(sizes), FRAME)
    frames["full_height"], frames["full_width"] = sizes.T
    frames["factor"] = factor
    frames["height"], frames["width"] = -(-sizes.T // factor)
    return frames


def into_frames(boxes: Boxes, frames: Frames) -> Boxes:
    """Boxes of full images in the coordinates of what is stored of them."""
    corner = np.stack([frames["left"], frames["top"]], 1)
    boxes = boxes / frames["factor"][:, None]
    return np.concatenate([boxes[:, :2] - corner, boxes[:, 2:]], axis=1)


def centre_boxes(
    sizes: npt.NDArray[np.integer],
    fraction: float,
    place: tuple[float, float] = (0.5, 0.5),
    out: Size | None = 1,
) -> Boxes:
    """`fraction`, of each side, of the largest box with the shape of `out`, or of the image itself;
    sizes [B, 2] (h, w).

    Of a square its side is `fraction` of the short side. `place` is (x, y): of what is left beside
    it, the share to its left and above it.
    """
    height, width = sizes[:, 0].astype(float), sizes[:, 1].astype(float)
    if out is None:
        w, h = width * fraction, height * fraction
    else:
        w = np.minimum(height * _aspect(out), width) * fraction
        h = np.minimum(height, width / _aspect(out)) * fraction
    x, y = place
    return np.stack([(width - w) * x, (height - h) * y, w, h], axis=1)


def _aspect(out: Size) -> float:
    height, width = height_width(out)
    return width / height


def random_boxes(
    crop: Crop, sizes: npt.NDArray[np.integer], *key: int | str, out: Size = 1
) -> Boxes:
    """Random resized crops (Szegedy et al. 2015): area and log aspect ratio uniform.

    The ratio is that of a crop to `out`: at 1, it shows without distortion.

    Up to ten draws each, as torchvision's RandomResizedCrop makes; where none fits into the
    image, the largest centred box with the nearest allowed aspect ratio.
    """
    height, width = sizes[:, :1].astype(float), sizes[:, 1:].astype(float)
    draw = uniforms((len(sizes), _CROP_TRIES, 4), *key, "crop")
    area = height * width * (crop.scale[0] + draw[..., 0] * (crop.scale[1] - crop.scale[0]))
    low, high = np.log(crop.ratio)
    aspect = _aspect(out)
    ratio = np.exp(low + draw[..., 1] * (high - low)) * aspect
    w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)  # [B, tries]
    fits = (w <= width) & (h <= height)
    first = fits.argmax(axis=1)
    rows = np.arange(len(sizes))
    w, h, u, v = w[rows, first], h[rows, first], draw[rows, first, 2], draw[rows, first, 3]
    boxes = np.stack([u * (width[:, 0] - w), v * (height[:, 0] - h), w, h], axis=1)
    return np.where(fits.any(axis=1)[:, None], boxes, _largest_boxes(crop, height, width, aspect))


def _largest_boxes(crop: Crop, height: Matrices, width: Matrices, aspect: float) -> Boxes:
    ratio = np.clip(width / height / aspect, *crop.ratio) * aspect
    w, h = np.minimum(width, height * ratio), np.minimum(height, width / ratio)
    return np.concatenate([(width - w) / 2, (height - h) / 2, w, h], axis=1)


def box_matrices(boxes: Boxes, out: Size) -> Matrices:
    """Maps that stretch each box over the whole output."""
    rows, columns = height_width(out)
    left, top, width, height = boxes.T
    matrices = np.zeros((len(boxes), 3, 3))
    matrices[:, 0, 0], matrices[:, 0, 2] = width / columns, left
    matrices[:, 1, 1], matrices[:, 1, 2] = height / rows, top
    matrices[:, 2, 2] = 1
    return matrices


def affine_matrices(
    affine: Affine | None, flip: float, count: int, out: Size, *key: int | str
) -> Matrices:
    """Random flips and small affine maps of the output about its centre."""
    height, width = height_width(out)
    matrices = np.tile(np.eye(3), (count, 1, 1))
    if affine is not None:
        signed = uniforms((6, count), *key, "affine") * 2 - 1
        angle, shear = np.deg2rad(signed[0] * affine.degrees), np.deg2rad(signed[1] * affine.shear)
        zoom = 1 + signed[2] * affine.scale
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        matrices[:, 0, 0], matrices[:, 0, 1] = cos, cos * np.tan(shear) - sin
        matrices[:, 1, 0], matrices[:, 1, 1] = sin, sin * np.tan(shear) + cos
        matrices[:, 0, 2] = signed[3] * affine.translate * width
        matrices[:, 1, 2] = signed[4] * affine.translate * height
    if flip > 0:
        mirrored = uniforms((count,), *key, "flip") < flip
        matrices[mirrored, :, 0] *= -1
    centre = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    back = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
    return centre @ matrices @ back


def to_theta(matrices: Matrices, out: Size, canvas: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Normalised maps for `sampling_grid`: [B, 2, 3], or [B, 3, 3] where one is no affine map.

    `canvas` is (height, width) of the padded source. torch's grids run over [-1, 1] from
    edge to edge (align_corners=False).
    """
    height, width = canvas
    rows, columns = height_width(out)
    source = np.array([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]])
    output = np.array([[columns / 2, 0, columns / 2], [0, rows / 2, rows / 2], [0, 0, 1]])
    theta: npt.NDArray[np.float32] = (source @ matrices @ output).astype(np.float32)
    return theta[:, :2] if is_affine(matrices) else theta
