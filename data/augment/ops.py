"""What a recipe's list `augment.ops` asks for: maps for the one warp, operations on pixels."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bigbatch.configs import augment_ops as c
from bigbatch.configs.augment import Augment
from bigbatch.data.augment import colour, erase, filters, noise, tone
from bigbatch.data.augment.operation import Draws, Operation, on_rows, per_image, size_of
from bigbatch.data.augment.policies import apply_policy
from bigbatch.data.maps import Map

Floats = npt.NDArray[np.float64]


def maps_of(augment: Augment, seen: Counter[str]) -> tuple[Map, ...]:
    """The geometric operations of the list, numbered by `seen`, which is counted on."""
    found = []
    for op in augment.ops:
        if isinstance(op, c.Geometric):
            found.append(Map(op.name, seen[op.name], op.p, _values(op)))
            seen[op.name] += 1
    return tuple(found)


def _values(op: c.Geometric) -> tuple[float, ...]:
    match op:
        case c.Rotate():
            return (op.degrees,)
        case c.Shear() | c.Translate():
            return (op.x, op.y)
        case c.Scale():
            return op.factor
        case c.Perspective():
            return (op.distortion,)
        case c.VerticalFlip():
            return ()
        case c.PadCrop():
            return (op.padding,)


def operations(augment: Augment, mean: Tensor, std: Tensor) -> list[Operation]:
    """All others, in their order; `mean` and `std` [C] on the device are those of normalisation."""
    others = [op for op in augment.ops if not isinstance(op, c.Geometric)]
    return [Operation(op.name, _operation(op, mean, std)) for op in others]


Apply = Callable[[Tensor, Draws], Tensor]


def _operation(op: Any, mean: Tensor, std: Tensor) -> Apply:
    match op:
        case c.HSV():
            spread = (op.hue, op.saturation, op.value)
            shifts = np.array([0.0, 1.0, 1.0])
            return _some(op, colour.hsv, lambda u: (u * 2 - 1) * _column(spread) + _column(shifts))
        case c.Grayscale():
            return _some(op, tone.grayscale)
        case c.FancyPCA():
            return _pca(op)
        case c.Blur():
            largest = op.sigma[1]
            return _some(op, lambda x, sigma: filters.blur(x, sigma, largest), _between(op.sigma))
        case c.Sharpen():
            return _some(op, filters.sharpness, _between(op.factor))
        case c.Noise():
            return _noise(op)
        case c.Solarize():
            return _some(op, tone.solarize, _constant(op.threshold))
        case c.Posterize():
            return _some(op, tone.posterize, _constant(op.bits))
        case c.Equalize():
            return _some(op, tone.equalize)
        case c.AutoContrast():
            return _some(op, tone.autocontrast)
        case c.Invert():
            return _some(op, tone.invert)
        case c.Erasing() | c.Cutout():
            return _erase(op, mean, std)
        case _:
            fill = _fill(op.fill, mean)
            return lambda images, draws: apply_policy(images, draws, op, fill)


def _some(
    op: Any,
    change: Callable[..., Tensor],
    values: Callable[[Floats], Floats] = lambda u: u[:0],
) -> Apply:
    """`change` on the images that take part, with what `values` makes of uniforms [k, B]."""

    def apply(images: Tensor, draws: Draws) -> Tensor:
        u = draws.uniforms(_MOST_VALUES + 1, len(images))
        rows = np.flatnonzero(u[0] < op.p)
        return on_rows(images, rows, change, *values(u[1:])[:, rows])

    return apply


_MOST_VALUES = 3


def _column(values: Any) -> Floats:
    return np.asarray(values, float)[:, None]


def _constant(value: float) -> Callable[[Floats], Floats]:
    return lambda u: np.full_like(u[:1], value)


def _between(ends: tuple[float, float]) -> Callable[[Floats], Floats]:
    low, high = ends
    return lambda u: low + u[:1] * (high - low)


def _pca(op: c.FancyPCA) -> Apply:
    axes = np.array(op.eigenvectors) * op.eigenvalues * op.std  # [C, axes]

    def apply(images: Tensor, draws: Draws) -> Tensor:
        count = len(images)
        rows = np.flatnonzero(draws.uniforms(count) < op.p)
        alphas = draws.generator().standard_normal((count, axes.shape[1]))
        return on_rows(images, rows, colour.shift_channels, (alphas @ axes.T)[rows])

    return apply


def _noise(op: c.Noise) -> Apply:
    def change(images: Tensor, stds: Tensor, keys: Tensor) -> Tensor:
        drawn = noise.normals(keys, images.shape)
        return images.addcmul_(drawn, per_image(stds)).clamp_(0, 1)

    def apply(images: Tensor, draws: Draws) -> Tensor:
        u = draws.uniforms(2, len(images))
        rows = np.flatnonzero(u[0] < op.p)
        stds = op.std[0] + u[1] * (op.std[1] - op.std[0])
        return on_rows(images, rows, change, stds[rows], draws.keys(len(images))[rows])

    return apply


def _erase(op: c.Erasing | c.Cutout, mean: Tensor, std: Tensor) -> Apply:
    fill = _fill("mean" if op.fill == "noise" else op.fill, mean)

    def change(images: Tensor, rectangles: Tensor, keys: Tensor) -> Tensor:
        inside = fill
        if op.fill == "noise":
            inside = noise.normals(keys, images.shape).mul_(std[:, None, None]).add_(fill)
        return erase.erase(images, rectangles, inside)

    def apply(images: Tensor, draws: Draws) -> Tensor:
        count, size = len(images), size_of(images)
        rows = np.flatnonzero(draws.uniforms(count) < op.p)
        if isinstance(op, c.Cutout):
            rectangles = erase.cutout_rectangles(op, draws, count, size)
        else:
            rectangles = erase.erasing_rectangles(op, draws, count, size)
        return on_rows(images, rows, change, rectangles[rows], draws.keys(count)[rows])

    return apply


def _fill(fill: str, mean: Tensor) -> Tensor:
    """[C, 1, 1]"""
    return (mean if fill == "mean" else mean.new_zeros(mean.shape))[:, None, None]
