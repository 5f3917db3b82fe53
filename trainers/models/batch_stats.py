"""BatchNorm running statistics that do not depend on the world size.

Each micro-batch is normalised by its own statistics. The running statistics move once a
step, towards the mean of those over all of the step's micro-batches on all ranks. The same
holds of EvoNorm's running variance (Liu et al. 2020, arXiv:2004.02967, B variants), which
timm blends in as BatchNorm does. Other state that a forward pass changes is refused at the
start (`check_state`): it would depend on which rank computes which micro-batch.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.layers.evo_norm import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bigbatch.configs.errors import UserError
from bigbatch.trainers.models.norm_layers import BatchRenorm, FrozenBatch

# Each keeps old * (1 - momentum) + new * momentum of statistics that it does not train with.
_AVERAGED = (_BatchNorm, EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2)
_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"


def averaged_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers, by name, that normalise with running statistics when they do not train."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _AVERAGED)
        and module.running_var is not None
        and not isinstance(module, FrozenBatch)
        and not getattr(module, "keeps_statistics", False)  # trainers/optim/stages.py, freeze
    ]


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of those layers, and their counters, by name: not copied."""
    return {
        f"{name}.{kind}": buffer
        for name, layer in averaged_layers(model)
        for kind in (*_STATISTICS, _COUNTER)
        if (buffer := getattr(layer, kind, None)) is not None
    }


class StepStatistics:
    """Collects the statistics of a step's micro-batches and blends them in once.

    Within a step the layers run with momentum 1, so after each forward pass their running
    buffers hold that micro-batch's own mean and (unbiased) variance.
    """

    def __init__(self, model: nn.Module) -> None:
        averaged = averaged_layers(model)
        self.layers = [layer for _, layer in averaged]
        self.momentum = [0.1 if m.momentum is None else m.momentum for m in self.layers]
        for layer in self.layers:
            layer.momentum = 1.0
        kept = [
            (f"{name}.{kind}", buffer, momentum)
            for (name, layer), momentum in zip(averaged, self.momentum, strict=True)
            for kind in _STATISTICS
            if (buffer := getattr(layer, kind, None)) is not None
        ]
        self.names = [name for name, _, _ in kept]
        self.buffers: list[Tensor] = [buffer for _, buffer, _ in kept]
        self.weights = [momentum for _, _, momentum in kept]
        counters = [getattr(layer, _COUNTER, None) for layer in self.layers]
        self.counters: list[Tensor] = [c for c in counters if c is not None]
        self.kept = [b.clone() for b in self.buffers]
        self.kept_counters = [c.clone() for c in self.counters]
        before = {id(b): k for b, k in zip(self.buffers, self.kept, strict=True)}
        before |= {id(c): k for c, k in zip(self.counters, self.kept_counters, strict=True)}
        for layer in self.layers:
            if isinstance(layer, BatchRenorm):
                layer.reference = (
                    before[id(layer.running_mean)],
                    before[id(layer.running_var)],
                    before[id(layer.num_batches_tracked)],
                )
        # float64: the sum is then the same in whatever order ranks and micro-batches come.
        self.sums = [torch.zeros_like(b, dtype=torch.float64) for b in self.buffers]

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the statistics as they are before the step."""
        if self.layers:
            torch._foreach_copy_(self.kept, self.buffers)
            torch._foreach_zero_(self.sums)
        if self.counters:
            torch._foreach_copy_(self.kept_counters, self.counters)

    @torch.no_grad()
    def add(self) -> None:
        """Take in the micro-batch that has just gone forward."""
        if self.layers:
            torch._foreach_add_(self.sums, self.buffers)

    def check(self) -> None:
        """Raise UserError where the statistics that training starts from are not finite."""
        if bad := self.non_finite(self._flat(self.buffers)):
            raise UserError(
                f"{bad[0]} of the model is not finite ({len(bad)} of {len(self.names)} running "
                "statistics are not); no step would mend it, so start from other weights"
            )

    def non_finite(self, total: Tensor) -> list[str]:
        """Names of the statistics that are not finite in `total`, a vector like `local`."""
        parts = total.split([b.numel() for b in self.buffers])
        finite = zip(self.names, parts, strict=True) if self.buffers else ()
        return [name for name, part in finite if not math.isfinite(float(part.sum()))]

    @staticmethod
    def _flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.double().flatten() for t in tensors]) if tensors else torch.zeros(0)

    def local(self) -> Tensor:
        """This rank's sums as one vector, to be summed over ranks."""
        return self._flat(self.sums)

    @torch.no_grad()
    def finish(self, total: Tensor, micro_batches: int, power: float = 1.0) -> None:
        """Blend in the mean over all micro-batches; `total` is `local` summed over ranks.

        What is old keeps its share (1 - momentum) to this `power`: that of so many steps.
        """
        self.discard()
        if self.layers:
            # Counted in steps: counted in forward passes it would depend on the world size. Not
            # where a layer waits to learn: it stands in evaluation, and its statistics stay.
            moving = [
                counter
                for layer in self.layers
                if layer.training and (counter := getattr(layer, _COUNTER, None)) is not None
            ]
            if moving:
                torch._foreach_add_(moving, 1)
            parts = total.div(micro_batches).split([s.numel() for s in self.sums])
            means = [p.view_as(b).to(b) for p, b in zip(parts, self.buffers, strict=True)]
            shares = self.weights
            if power != 1.0:
                shares = [1.0 - (1.0 - momentum) ** power for momentum in self.weights]
            torch._foreach_lerp_(self.buffers, means, shares)

    @torch.no_grad()
    def discard(self) -> None:
        """Put back the statistics from before the step, as when the step is skipped."""
        if self.layers:
            torch._foreach_copy_(self.buffers, self.kept)
        if self.counters:
            torch._foreach_copy_(self.counters, self.kept_counters)


@torch.no_grad()
def recompute_statistics(
    model: nn.Module,
    batches: Iterable[Tensor],
    total_batches: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Set running statistics to their plain mean over `batches` of images, across ranks.

    `total_batches` counts the batches of all ranks; forward passes run under `autocast`. Each
    batch is one forward pass, without gradients: the same bits as in training.
    """
    corrected = [(m, m.reference) for m in model.modules() if isinstance(m, BatchRenorm)]
    statistics = StepStatistics(model)
    if not statistics.layers:
        return
    for layer, _ in corrected:  # the statistics alone, and not as far as old ones let them be
        layer.reference = None
    statistics.weights = [1.0] * len(statistics.weights)
    statistics.begin()
    was_training = model.training
    model.eval()  # dropout must not disturb what BatchNorm sees
    for layer in statistics.layers:
        layer.train()
    for images in batches:
        with autocast():
            model(images)
        statistics.add()
    statistics.finish(sum_over_ranks(statistics.local()), total_batches)
    if statistics.counters:  # of training's steps, of which this is none
        torch._foreach_copy_(statistics.counters, statistics.kept_counters)
    for layer, momentum in zip(statistics.layers, statistics.momentum, strict=True):
        layer.momentum = momentum
    for layer, reference in corrected:
        layer.reference = reference
    model.train(was_training)


def check_state(
    model: nn.Module, forward: Callable[[nn.Module, Tensor], object], images: Tensor
) -> None:
    """Raise UserError where training changes state that ranks cannot agree on.

    Makes a forward pass of a copy of `model` in training mode over `images` [B, C, H, W], as
    `forward(model, images)`, and compares: what changed, and is no running statistic that
    `StepStatistics` averages, has a name in the message. Weights whose gradients are averaged
    may not change in it either. A table that a first pass fills and that no images and no
    second pass change may stay. No pass is made where there is nothing that could change, or
    where parameters are on the meta device. Random streams stay as they are.
    """
    owned = {
        id(buffer)
        for m in model.modules()
        if isinstance(m, _AVERAGED)
        for kind in (*_STATISTICS, _COUNTER)
        if (buffer := getattr(m, kind, None)) is not None
    }
    state = dict(_state(model))
    others = [name for name, t in state.items() if id(t) not in owned]
    frozen_or_buffer = any(not state[name].requires_grad for name in others)
    if not frozen_or_buffer or any(t.is_meta for t in state.values()):
        return
    probe = _moved(model)
    before, after = _copied(probe), _passed(probe, forward, images)
    changed = [name for name in others if not _same(before[name], after.get(name))]
    if not changed:
        return
    again = _passed(probe, forward, images)
    elsewhere = _passed(_moved(model), forward, images.flip(0) / 2 + 1)
    for name in changed:
        filled = after.get(name)
        if filled is None or not (
            _same(filled, again.get(name)) and _same(filled, elsewhere.get(name))
        ):
            owner = model.get_submodule(name.rpartition(".")[0])
            raise UserError(
                f"{name} of the model ({type(owner).__name__}) changes in a forward pass: it would "
                "depend on which rank computes which micro-batch, and stay changed by a step that "
                "is skipped. Build the model without that layer, or with one of torch's BatchNorm "
                "or timm's EvoNorm, whose statistics are averaged over all micro-batches of a step"
            )


@torch.no_grad()
def _moved(model: nn.Module) -> nn.Module:
    """A copy to try, away from its start, where an average of weights equals the weights."""
    probe = copy.deepcopy(model).train()
    for parameter in probe.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.01)
    return probe


@torch.no_grad()
def _passed(
    probe: nn.Module, forward: Callable[[nn.Module, Tensor], object], images: Tensor
) -> dict[str, Tensor]:
    """The state after one more pass."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        forward(probe, images)
    return _copied(probe)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _state(model)}


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _same(before: Tensor, after: Tensor | None) -> bool:
    if after is None or before.shape != after.shape or before.dtype != after.dtype:
        return False
    equal: Tensor = (before == after) | ((before != before) & (after != after))
    return bool(equal.all())
