"""Geometric operations as matrices: each map leads from a point that is shown to its source.

Of the rectangle of the model's input, [0, width] x [0, height], in continuous coordinates (pixel i
covers [i, i + 1]), as (x, y, 1). No torch: a decoding worker needs them as well.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bigbatch.configs.size import Size, height_width
from bigbatch.data.rng import uniforms

Matrices = npt.NDArray[np.float64]  # [B, 3, 3]
Values = npt.NDArray[np.float64]  # [B]
HORIZON = 1e-6  # the least denominator of a perspective


class Map(NamedTuple):
    """A geometric operation of a recipe, in plain values."""

    name: str
    occurrence: int  # how many of its name stand before it
    p: float
    values: tuple[float, ...]


def draw_maps(one: Map, count: int, out: Size, *key: int | str) -> Matrices:
    """The map of each of `count` images, drawn by (key, name, occurrence); some are no map."""
    height, width = height_width(out)
    centre = width / 2, height / 2
    place = (*key, one.name, one.occurrence) if one.occurrence else (*key, one.name)
    chance, *u = uniforms((9, count), *place)
    low_high = [2 * x - 1 for x in u]
    match one.name, one.values:
        case "rotate", (degrees,):
            found = rotation(low_high[0] * degrees, out)
        case "shear", (x, y):
            slopes = np.tan(np.deg2rad([low_high[0] * x, low_high[1] * y]))
            found = about(centre, linear(1, slopes[0], slopes[1], 1))
        case "translate", (x, y):
            found = translation(low_high[0] * x * width, low_high[1] * y * height)
        case "scale", (low, high):
            zoom = np.exp(-(np.log(low) + u[0] * np.log(high / low)))
            found = about(centre, linear(zoom, 0, 0, zoom))
        case "vertical_flip", ():
            found = about(centre, linear(1, 0, 0, np.full(count, -1.0)))
        case "pad_crop", (padding,):
            shifts = np.floor(np.array(u[:2]) * (2 * padding + 1)) - padding
            found = translation(shifts[0], shifts[1])
        case "perspective", (distortion,):
            sides = np.tile([[width], [height]], (4, 1))  # of x and y of each corner
            found = perspective(np.array(u) * distortion * sides / 2, out)
        case _:
            raise ValueError(one)
    return np.where((chance < one.p)[:, None, None], found, np.eye(3))


def linear(
    xx: Values | float, xy: Values | float, yx: Values | float, yy: Values | float
) -> Matrices:
    """Maps with these linear parts, and no shift."""
    parts = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in (xx, xy, yx, yy)))
    matrices = np.tile(np.eye(3), (len(parts[0]), 1, 1))
    matrices[:, :2, :2] = np.stack(parts, 1).reshape(-1, 2, 2)
    return matrices


def translation(x: Values | float, y: Values | float) -> Matrices:
    """Each point's source is (x, y) pixels to its right and below it."""
    shifts = np.broadcast_arrays(np.atleast_1d(x), np.atleast_1d(y))
    matrices = np.tile(np.eye(3), (len(shifts[0]), 1, 1))
    matrices[:, :2, 2] = np.stack(shifts, 1)
    return matrices


def about(centre: tuple[float, float], matrices: Matrices) -> Matrices:
    """The same maps with `centre` in the place of the origin."""
    x, y = centre
    there = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
    back = np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1]])
    found: Matrices = there @ matrices @ back
    return found


def rotation(degrees: Values, out: Size) -> Matrices:
    """Images turned to the left about their centre, as Pillow's `rotate`."""
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    height, width = height_width(out)
    return about((width / 2, height / 2), linear(cos, -sin, sin, cos))


def perspective(inwards: npt.NDArray[np.float64], out: Size) -> Matrices:
    """Where each corner appears `inwards` [8, B] pixels, (x, y) of each, clockwise from the
    top left one."""
    height, width = (float(side) for side in height_width(out))
    source = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    towards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    shown = source + towards * inwards.T.reshape(-1, 4, 2)  # [B, 4, 2]
    x, y = shown[..., 0], shown[..., 1]
    one, zero = np.ones_like(x), np.zeros_like(x)
    equations = np.concatenate(
        [
            np.stack([x, y, one, zero, zero, zero, -x * source[:, 0], -y * source[:, 0]], -1),
            np.stack([zero, zero, zero, x, y, one, -x * source[:, 1], -y * source[:, 1]], -1),
        ],
        axis=1,
    )  # [B, 8, 8]
    right = np.broadcast_to(source.T.reshape(8, 1), (len(x), 8, 1))
    parts = np.linalg.solve(equations, right)[..., 0]
    return np.concatenate([parts, np.ones((len(x), 1))], 1).reshape(-1, 3, 3)


def is_affine(matrices: Matrices) -> bool:
    return bool((matrices[:, 2] == [0, 0, 1]).all())


def apply_maps(matrices: Matrices, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where points [2, K] come from: [B, 2, K]. Beyond a horizon they are very far away."""
    found = matrices @ np.concatenate([points, np.ones((1, points.shape[1]))])
    return found[:, :2] / np.maximum(found[:, 2:], HORIZON)


def jacobians(matrices: Matrices, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Derivatives of the maps at points [2, K]: [B, K, 2 (x, y of the source), 2]."""
    homogeneous = matrices @ np.concatenate([points, np.ones((1, points.shape[1]))])
    w = np.maximum(homogeneous[:, 2], HORIZON)[..., None, None]  # [B, K, 1, 1]
    found = np.moveaxis(homogeneous[:, :2], 1, 2)[..., None] / w  # [B, K, 2, 1]
    bottom = matrices[:, None, 2:, :2]  # [B, 1, 1, 2]
    derivatives: npt.NDArray[np.float64] = (matrices[:, None, :2, :2] - found * bottom) / w
    return derivatives
