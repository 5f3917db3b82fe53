"""Squared norms of micro-batches' gradients, taken while they still stand alone."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

_SPLIT = 2.0**29 + 1  # leaves the upper 24 bits of a float64 (Dekker 1971)


class MicroBatchNorms:
    """Adds up the squared norms of micro-batches' gradients, on the device.

    A gradient can be measured only while it stands alone. Where gradients add up in place
    that is a rank's first micro-batch of the step; where this is also its last, DDP sends
    the gradient away, bucket by bucket, while the backward pass still runs, and `hook`
    reads each bucket before it leaves.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.passes = 0  # backward passes that ended in this step

    def begin(self) -> None:
        self.total.zero_()
        self.passes = 0

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor]) -> None:
        square = nn.utils.get_total_norm(gradients).double().square()
        split = square * _SPLIT
        self.total += split - (split - square)  # to 24 bits: sums are then exact, in any order

    def hook(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's own all-reduce of a bucket, after a look at the gradients of this rank."""
        if self.passes == 0:
            self.add([bucket.buffer()])
        return allreduce_hook(state, bucket)
