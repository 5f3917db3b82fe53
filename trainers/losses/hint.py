"""What a layer inside a model looks at, and what a student loses by looking elsewhere.

Nothing of it is learned, so there are no weights beside the model's own.
"""

import difflib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.configs.errors import UserError


def attention(features: Tensor, grid: int) -> Tensor:
    """Where a layer's maps [B, C, H, W] have their energy: unit vectors [B, grid * grid].

    Zagoruyko and Komodakis 2017, "Paying more attention to attention", section 3.1 with p = 2:
    squares, their mean over channels, and that over the cells of a grid, so that layers of any
    size compare. Cells are taken by products of matrices, whose gradient is the same each time.
    """
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    energy = precise.square().mean(1)
    down, across = (area_weights(size, grid).to(energy) for size in energy.shape[1:])
    return F.normalize((down @ energy @ across.T).flatten(1))


def attention_transfer(features: Tensor, taught: Tensor) -> Tensor:
    """Mean squared difference of attention; the teacher's is [B, grid * grid].

    As in the authors' code, szagoruyko/attention-transfer, a mean over places as well.
    """
    return F.mse_loss(attention(features, math.isqrt(taught.shape[1])), taught)


def area_weights(size: int, grid: int) -> Tensor:
    """Rows [grid, size], float64, that average `size` pixels over `grid` cells by area."""
    pixels = torch.arange(size, dtype=torch.float64)
    cells = torch.arange(grid, dtype=torch.float64)[:, None] * (size / grid)
    overlap = torch.minimum(cells + size / grid, pixels + 1) - torch.maximum(cells, pixels)
    return overlap.clamp(min=0) * (grid / size)


class Watched:
    """What a layer of `model` gave in the newest forward pass: maps [B, C, H, W].

    Only in the mode, of training or not, that the model is in now; a copy of the model writes
    here too. Raises UserError, which says `whose` layer it is, where there is none of that name.
    """

    def __init__(self, model: nn.Module, name: str, whose: str) -> None:
        layers = {path: layer for path, layer in model.named_modules() if path}
        if name not in layers:
            near = difflib.get_close_matches(name, layers, 3) or list(layers)[:5]
            raise UserError(f"{whose} has no layer {name!a:.80}; it has {', '.join(near)}, ...")
        self._what, self._training = f"layer {name} of {whose}", model.training
        self._seen: Any = None
        # A function of its own: with a bound method, a copy of the model would copy this, too.
        layers[name].register_forward_hook(lambda layer, _, output: self._keep(layer, output))

    def _keep(self, layer: nn.Module, output: Any) -> None:
        if layer.training is self._training:
            self._seen = output

    def take(self) -> Tensor:
        """The maps, which are then forgotten. UserError where it gave none."""
        seen, self._seen = self._seen, None
        if not isinstance(seen, Tensor) or seen.ndim != 4:
            found = list(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
            raise UserError(
                f"{self._what} gives {found}, and a hint needs maps [B, C, H, W]; name another one"
            )
        return seen
