"""BatchNorm running statistics that do not depend on the world size.

Each micro-batch is normalised by its own statistics. The running statistics move once a
step, towards the mean of those over all of the step's micro-batches on all ranks.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class StepStatistics:
    """Collects the statistics of a step's micro-batches and blends them in once.

    Within a step the layers run with momentum 1, so after each forward pass their running
    buffers hold that micro-batch's own mean and (unbiased) variance.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [
            m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None
        ]
        self.momentum = [0.1 if m.momentum is None else m.momentum for m in self.layers]
        for layer in self.layers:
            layer.momentum = 1.0
        self.buffers: list[Tensor] = [
            b for m in self.layers for b in (m.running_mean, m.running_var) if b is not None
        ]
        self.counters: list[Tensor] = [
            m.num_batches_tracked for m in self.layers if m.num_batches_tracked is not None
        ]
        self.weights = [w for m in self.momentum for w in (m, m)]
        self.kept = [b.clone() for b in self.buffers]
        self.kept_counters = [c.clone() for c in self.counters]
        # float64: the sum is then the same in whatever order ranks and micro-batches come.
        self.sums = [torch.zeros_like(b, dtype=torch.float64) for b in self.buffers]

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the statistics as they are before the step."""
        if self.layers:
            torch._foreach_copy_(self.kept, self.buffers)
            torch._foreach_copy_(self.kept_counters, self.counters)
            torch._foreach_zero_(self.sums)

    @torch.no_grad()
    def add(self) -> None:
        """Take in the micro-batch that has just gone forward."""
        if self.layers:
            torch._foreach_add_(self.sums, self.buffers)

    def local(self) -> Tensor:
        """This rank's sums as one vector, to be summed over ranks."""
        return torch.cat([s.flatten() for s in self.sums]) if self.layers else torch.zeros(0)

    @torch.no_grad()
    def finish(self, total: Tensor, micro_batches: int) -> None:
        """Blend in the mean over all micro-batches; `total` is `local` summed over ranks."""
        self.discard()
        if self.layers:
            # Counted in steps: counted in forward passes it would depend on the world size.
            torch._foreach_add_(self.counters, 1)
            parts = total.div(micro_batches).split([s.numel() for s in self.sums])
            means = [p.view_as(b).to(b) for p, b in zip(parts, self.buffers, strict=True)]
            torch._foreach_lerp_(self.buffers, means, self.weights)

    @torch.no_grad()
    def discard(self) -> None:
        """Put back the statistics from before the step, as when the step is skipped."""
        if self.layers:
            torch._foreach_copy_(self.buffers, self.kept)
            torch._foreach_copy_(self.counters, self.kept_counters)


@torch.no_grad()
def recompute_statistics(
    model: nn.Module,
    batches: Iterable[Tensor],
    total_batches: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> None:
    """Set running statistics to their plain mean over `batches` of images, across ranks.

    For weights that no training step produced, such as an average of several models.
    `total_batches` counts the batches of all ranks.
    """
    statistics = StepStatistics(model)
    statistics.weights = [1.0] * len(statistics.weights)
    statistics.begin()
    was_training = model.training
    model.eval()  # dropout must not disturb what BatchNorm sees
    for layer in statistics.layers:
        layer.train()
    for images in batches:
        model(images)
        statistics.add()
    statistics.finish(sum_over_ranks(statistics.local()), total_batches)
    for layer, momentum in zip(statistics.layers, statistics.momentum, strict=True):
        layer.momentum = momentum
    model.train(was_training)
