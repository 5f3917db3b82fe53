"""Repeated augmentation: each sample several times, every time with another view of it.

The views of a sample stand at the same place of micro-batches that follow each other: so a
micro-batch holds no sample twice, mixup never mixes an image with itself, and any rank can ask
for any of them. What they show differs because crops, colours and all else are drawn by (step,
micro-batch, place). Sources: Hoffer et al. 2020 (arXiv:1901.09335); Berman et al. 2019
(arXiv:1902.05509), whose sampler DeiT and timm have: an epoch keeps its number of images.
"""

import numpy as np

from bigbatch.data.order import Order, Positions


class RepeatedOrder(Order):
    """Another order, each of whose samples comes `repeats` times.

    Micro-batch n of the other order, of `micro_batch` samples, is `repeats` of them here, from
    n * repeats on. `epoch_samples` stays, so that an epoch of the other takes `repeats` of these.
    """

    def __init__(self, order: Order, repeats: int, micro_batch: int) -> None:
        identity = f"repeats={repeats} micro_batch={micro_batch} {order.hash}"
        super().__init__(order.index, order.seed, order._policy, identity)
        self.repeats, self.micro_batch = repeats, micro_batch

    def samples(self, positions: Positions) -> Positions:
        """The sample at each position, int64 [n]."""
        return super().samples(self._within(np.asarray(positions, np.int64)))

    def substitute(self, sample: int, position: int, attempt: int) -> int:
        """The same other sample in the place of each view of a bad one."""
        within = self._within(np.array([position], np.int64))
        return super().substitute(sample, int(within[0]), attempt)

    def _within(self, positions: Positions) -> Positions:
        """Where positions lead in the order whose samples are repeated."""
        numbers, places = np.divmod(positions, self.micro_batch)
        return numbers // self.repeats * self.micro_batch + places
