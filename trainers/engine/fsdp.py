"""FSDP2: parameters, gradients and optimizer state in rows (torch.distributed.fsdp)."""

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bigbatch.trainers.engine.gradient_norms import MicroBatchNorms
from bigbatch.trainers.engine.pieces import Piece, row_piece
from bigbatch.trainers.engine.sharded import ShardedEngine


class FsdpEngine(ShardedEngine):
    """Whole parameters exist only while a block of the model computes, block by block."""

    def shard(self, model: nn.Module) -> list[Piece]:
        self._plain = copy.deepcopy(model)  # `full_model` fills it; so long without parameters
        _empty(self._plain)
        self.module = self.accelerator.prepare_model(model, evaluation_mode=True)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in blocks(self.module):
            fully_shard(block, mesh=mesh)
        fully_shard(self.module, mesh=mesh)
        self._units = [m for m in self.module.modules() if isinstance(m, FSDPModule)]
        reduce_scatter: Any = _Seen(self._norms)
        for unit in self._units:
            unit.set_custom_reduce_scatter(reduce_scatter)
        self.model = self.module
        self._sharded: list[tuple[Any, Piece]] = [
            (p, row_piece(name, p)) for name, p in self.module.named_parameters() if p.requires_grad
        ]
        return [piece for _, piece in self._sharded]

    def zero_grad(self) -> None:
        for parameter, piece in self._sharded:
            parameter.grad = piece.tensor.grad = None
        self._norms.begin()

    def freeze(self, names: Collection[str]) -> None:
        self.frozen = frozenset(names)
        if not self.frozen or self._watched:
            return
        places = {
            (id(module), key): f"{path}.{key}" if path else key
            for path, module in self.module.named_modules()
            for key in module._parameters
        }

        def watch(unit: nn.Module, inputs: Any) -> None:
            """Gradients are those of whole parameters, which FSDP2 has put here by now."""
            for module in unit.modules():
                for key, parameter in module._parameters.items():
                    name = places[id(module), key]
                    if parameter is None or isinstance(parameter, DTensor):
                        continue
                    if parameter.requires_grad and name not in self._watched:
                        self._watched.add(name)
                        parameter.register_hook(partial(self._held_back, name))

        for unit in self._units:
            unit.register_forward_pre_hook(watch)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self._reducing = self.even or last
        if not self.even:
            # Parameters are gathered once a step, and gradients scattered once.
            root: Any = self.module
            root.set_requires_gradient_sync(last)
            root.set_reshard_after_forward(False)
            root.set_reshard_after_backward(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # The mean over ranks, which FSDP2 takes, becomes the mean over all samples.
        self.accelerator.backward(loss * (self.world / self.micro_batches))
        if self._norms.passes == 0 and not self._reducing:
            self._norms.add(self._own_gradients())
        self._norms.passes += 1

    def _own_gradients(self) -> list[Tensor]:
        """Of this rank alone, where they have not crossed ranks."""
        found = [p.grad for p in self.module.parameters()]
        return [g for g in found if g is not None and not isinstance(g, DTensor)]

    def reduce(self) -> None:
        for parameter, piece in self._sharded:
            piece.tensor.grad = parameter.grad.to_local()

    def update(self) -> None:
        self.optimizer.step()

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        self._fill()
        try:
            yield self._plain
        finally:
            _empty(self._plain)

    def end_training(self) -> None:
        self._fill()
        self.module = self._plain

    @torch.no_grad()
    def _fill(self) -> None:
        for own, (_, value) in zip(
            self._plain.parameters(), self.module.named_parameters(), strict=True
        ):
            assert isinstance(value, DTensor)
            own.data = value.full_tensor()
        for mine, buffer in zip(self._plain.buffers(), self.module.buffers(), strict=True):
            mine.copy_(buffer)


class _Seen:
    """The reduce-scatter of FSDP2, after a look at this rank's own gradients."""

    def __init__(self, norms: MicroBatchNorms) -> None:
        self._norms = norms

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self._norms.passes == 0:
            self._norms.add([input_tensor])
        return dist.reduce_scatter_tensor(
            output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: what its innermost sequences of composed modules hold.

    Parameters outside of them belong to the root. A block is gathered and freed as a whole.
    """
    found = []
    for module in model.modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            found += [
                m for m in module if _composed(m) and not any(map(_holds_blocks, m.modules()))
            ]
    return found


def _composed(module: nn.Module) -> bool:
    has = next(module.parameters(), None) is not None
    return has and len(list(module.children())) > 0


def _holds_blocks(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList) and any(map(_composed, module))


def _empty(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
