"""What an operation is: a name, and a function of pixels and of draws that its name keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bigbatch.data.rng import key64, uniforms


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

    def generator(self) -> np.random.Generator:
        """For other distributions."""
        return np.random.Generator(np.random.Philox(key=key64(*self.key)))


class Operation(NamedTuple):
    """Images [B, C, H, W] in [0, 1] and their draws give other such images."""

    name: str
    apply: Callable[[Tensor, Draws], Tensor]


class Mixing(NamedTuple):
    """Images, soft targets [B, classes] and their draws give other images and targets."""

    name: str
    apply: Callable[[Tensor, Tensor, Draws], tuple[Tensor, Tensor]]
