"""Memory for batches of images that is used again."""

import math
import weakref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Memory:
    """Memory for float32 tensors that is used again when the last view of a tensor is gone.

    A batch of images is so large that each new one would come from the system as fresh pages,
    which takes as long as cropping them.
    """

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.float32]] = []

    def empty(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        buffer = self._free.pop() if self._free else np.empty(size, np.float32)
        if buffer.size < size:
            buffer = np.empty(size, np.float32)
        view = buffer[:size]  # which torch keeps for as long as any tensor uses it
        weakref.finalize(view, self._free.append, buffer).atexit = False
        return torch.from_numpy(view).view(shape)
