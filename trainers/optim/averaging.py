"""An average of the weights that training passes through, kept beside them.

Sources: Polyak and Juditsky 1992; Izmailov et al. 2018 (arXiv:1803.05407, SWA); Busbridge et al.
2023 (arXiv:2307.13813, how an exponential moving average goes with the batch).
"""

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor


class WeightAverage:
    """A weighted mean of weights w_1, ..., w_n, in which w_i has the weight exp(-(n - i) r).

    With rate r > 0 that is an exponential moving average, with r = 0 a plain mean. The weights
    add up to 1 from the first update on: what was there before, such as the initial weights,
    has no part in it, and with no update there is no average. It is kept in float64: float32
    loses the updates of long averages, whose share in them is as small as its rounding.

    Each rank averages what it updates itself: whole parameters, or its pieces of them, so no
    update needs another rank.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        steps: Collection[int],
        decay_rate: float,
        updates: Callable[[int], int] = lambda step: 1,
    ) -> None:
        """`weights` by name, of any shapes, are what training changes in place.

        Those after each of `steps` finished steps enter the average, as if they were those of
        `updates(step)` steps after each other.
        """
        self._weights = dict(weights)
        self._steps = steps
        self._decay_rate = decay_rate
        self._updates = updates
        self.count = 0  # n: how many weights have entered
        self.tensors = {
            name: torch.zeros_like(w, dtype=torch.float64, requires_grad=False)
            for name, w in weights.items()
        }

    def follow(self, steps: Collection[int], updates: Callable[[int], int]) -> None:
        """Go on by another plan, which has the same steps up to now."""
        self._steps, self._updates = steps, updates

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after `step` finished steps, if those enter."""
        if step not in self._steps:
            return
        updates = self._updates(step)
        self.count += updates
        share = newest_share(self.count, self._decay_rate, updates)
        means = list(self.tensors.values())
        torch._foreach_mul_(means, 1.0 - share)
        torch._foreach_add_(means, list(self._weights.values()), alpha=share)

    def averaged(self) -> dict[str, Tensor]:
        """The average as weights, rounded once to their dtype. There must have been an update."""
        assert self.count > 0, "no weights have entered the average"
        return {name: mean.to(self._weights[name].dtype) for name, mean in self.tensors.items()}

    def load(self, count: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `count` and `tensors` of an earlier average; with 0 from none.

        Raises ValueError where the tensors are not of these weights.
        """
        if count and tensors.keys() != self.tensors.keys():
            odd = sorted(tensors.keys() ^ self.tensors.keys())
            raise ValueError(f"the average does not fit: {odd[:8]}")
        for name, mean in self.tensors.items():
            if count == 0:
                mean.zero_()
            elif tensors[name].shape == mean.shape and tensors[name].dtype == mean.dtype:
                mean.copy_(tensors[name])
            else:
                raise ValueError(f"the average does not fit: {name}")
        self.count = count


def newest_share(count: int, decay_rate: float, updates: int = 1) -> float:
    """The weight of w_n in the mean of `count` n: (1 - d) / (1 - d^n), where d = exp(-rate).

    Of w_n that stands for `updates` k of the n: (1 - d^k) / (1 - d^n), so that d is d^k in it.
    """
    if decay_rate == 0.0:
        return updates / count
    return math.expm1(-decay_rate * updates) / math.expm1(-decay_rate * count)
