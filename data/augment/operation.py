"""What an operation is: a name, and a function of pixels and of draws that its name keys."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bigbatch.data.rng import key64, uniforms

_CACHED = 1 << 18  # values of images that a CPU changes together: 1 MB


@dataclass(frozen=True)
class Draws:
    """Random numbers of one operation on one micro-batch, drawn on the host.

    They follow from (seed, step, micro-batch, name, occurrence) alone: neither from the
    operation's place in the list nor from what others draw.
    """

    seed: int
    step: int
    index: int  # of the micro-batch in its step
    name: str
    occurrence: int = 0  # how many operations of this name stand before it

    @property
    def key(self) -> tuple[int | str, ...]:
        key = (self.seed, self.step, self.index, self.name)
        return (*key, self.occurrence) if self.occurrence else key

    def uniforms(self, *shape: int) -> npt.NDArray[np.float64]:
        """Numbers in [0, 1). The same at every call, so draw all that is needed in one."""
        return uniforms(shape, *self.key)

    def keys(self, count: int) -> npt.NDArray[np.int32]:
        """Keys [count, 2] of what is drawn on the device, pixel by pixel: another stream."""
        drawn = uniforms((count, 2), *self.key, "pixels")
        return (drawn * 2**32 - 2**31).astype(np.int32)

    def generator(self) -> np.random.Generator:
        """For other distributions."""
        return np.random.Generator(np.random.Philox(key=key64(*self.key)))


def per_image(values: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return values[:, None, None, None]


def size_of(images: Tensor) -> tuple[int, int]:
    """Height and width of images [B, C, H, W]."""
    return images.shape[2], images.shape[3]


def few_of(images: Tensor) -> int:
    """How many of a batch are changed together."""
    if images.device.type != "cpu":
        return len(images)
    return max(1, _CACHED // math.prod(images.shape[1:]))


def on_rows(
    images: Tensor,
    rows: npt.NDArray[np.int64],
    change: Callable[..., Tensor],
    *values: npt.NDArray[np.generic] | Tensor,
) -> Tensor:
    """images [B, C, H, W] with `change`(images [n, C, H, W], *values [n, ...]) in the place of
    those at `rows` [n]; `change` may overwrite what it is given.

    A device does all of them at once. A CPU does a few after another: they stay in its cache
    from the first pass over them to the last, and a batch does not.
    """
    given = [to_device(v, images.device) for v in values]
    few = few_of(images)
    for start in range(0, len(rows), few):
        some = rows[start : start + few]
        taken = [v[start : start + few] for v in given]
        change_in_place(images, some, change, *taken)
    return images


def change_in_place(
    images: Tensor,
    rows: npt.NDArray[np.int64],
    change: Callable[..., Tensor],
    *values: Tensor,
) -> None:
    """`change` on the images at some rows, all at once."""
    if rows[-1] - rows[0] == len(rows) - 1:  # they lie side by side
        place = images[rows[0] : rows[-1] + 1]
        keep(place, change(place, *values))
    else:
        places = to_device(rows, images.device)
        images[places] = change(images[places], *values)


def keep(place: Tensor, changed: Tensor) -> None:
    """What is `changed`, in its `place`, where it may be already."""
    if changed.data_ptr() != place.data_ptr() or changed.stride() != place.stride():
        place.copy_(changed)


def to_device(values: npt.NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    if isinstance(values, Tensor):
        return values
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.to(device, non_blocking=True)


class Operation(NamedTuple):
    """Images [B, C, H, W] in [0, 1] and their draws give other such images."""

    name: str
    apply: Callable[[Tensor, Draws], Tensor]


class Mixing(NamedTuple):
    """Images, soft targets [B, classes] and their draws give other images and targets."""

    name: str
    apply: Callable[[Tensor, Tensor, Draws], tuple[Tensor, Tensor]]
