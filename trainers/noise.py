"""The gradient noise scale, measured while training (McCandlish et al. 2018, appendix A.1).

Two squared norms a step are all it takes: that of a micro-batch's gradient and that of the
global batch's. They differ by noise alone, and by a known share of it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from bigbatch.trainers.advice.critical_batch import noise_and_signal

_MEMORY = 0.99  # weight of the past in the two averages: about a hundred steps


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
        self.total += nn.utils.get_total_norm(gradients).double().square()

    def hook(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's own all-reduce of a bucket, after a look at the gradients of this rank."""
        if self.passes == 0:
            self.add([bucket.buffer()])
        return allreduce_hook(state, bucket)


class NoiseScale:
    """The noise scale B_simple, in samples, from averages over about the last 100 steps.

    Noise and signal are averaged on their own, never their ratio, whose mean need not exist.
    The averages start anew when a run is resumed; the records that they are made of do not.
    """

    def __init__(self, micro_batch: int, global_batch: int) -> None:
        self._batches = micro_batch, global_batch
        self._noise = self._signal = 0.0

    def update(self, grad_sq_micro: float, grad_norm: float) -> dict[str, float]:
        """The values to record of a step: grad_sq_micro and noise_scale.

        `grad_sq_micro` is the mean squared norm of micro-batch gradients, `grad_norm` the
        norm of the global batch's; both without loss scale and before clipping. A step
        whose gradient is not finite is recorded and not averaged. noise_scale is NaN where
        no signal stands out of the noise. Nothing is recorded of steps of one micro-batch.
        """
        small, large = self._batches
        if small == large:
            return {}
        if math.isfinite(grad_sq_micro) and math.isfinite(grad_norm):
            noise, signal = noise_and_signal(grad_sq_micro, grad_norm**2, small, large)
            # Without correction for the start, which both share and the ratio cancels.
            self._noise = _MEMORY * self._noise + (1 - _MEMORY) * noise
            self._signal = _MEMORY * self._signal + (1 - _MEMORY) * signal
        resolved = self._signal > 0 and self._noise >= 0
        scale = self._noise / self._signal if resolved else math.nan
        return {"grad_sq_micro": grad_sq_micro, "noise_scale": scale}
