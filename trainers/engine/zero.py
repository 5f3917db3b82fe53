"""ZeRO-1 and ZeRO-2, by DeepSpeed (Rajbhandari et al. 2020, arXiv:1910.02054).

The only module that imports deepspeed. DeepSpeed cuts, reduces and gathers; which update a
parameter gets is left to the recipe's own optimizer. So DeepSpeed is given one group of all
parameters and an optimizer that does nothing but hand each named piece of the flat partition
to the real one, whose groups (decay, adaptation) are as without DeepSpeed.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.trainers.engine.pieces import Piece
from bigbatch.trainers.engine.sharded import ShardedEngine

_BUCKET = 1 << 25  # elements that travel together: 128 MiB


class ZeroEngine(ShardedEngine):
    """Stage 1 shards the optimizer state; stage 2 also the gradients."""

    def __init__(
        self, precision: str, stage: int, timeout_s: float = 600, *, deterministic: bool = False
    ) -> None:
        super().__init__(precision, timeout_s, deterministic=deterministic)
        found = get_accelerator().device_name()
        if found != self.device.type:
            raise UserError(
                f"DeepSpeed computes on {found} (DS_ACCELERATOR), torch on {self.device.type}; "
                "unset DS_ACCELERATOR, or use another backend"
            )
        self._stage = stage
        self._collected = ExitStack()
        logger.setLevel(logging.ERROR)
        # On a CPU DeepSpeed would compile an operator for inference, which training never calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def shard(self, model: nn.Module) -> list[Piece]:
        self.module = self.accelerator.prepare_model(model, evaluation_mode=True)
        trained: dict[str, Any] = {
            n: p for n, p in self.module.named_parameters() if p.requires_grad
        }
        for parameter in trained.values():
            # Before DeepSpeed's own hooks, which send the gradient away.
            parameter.register_post_accumulate_grad_hook(self._note_gradient)
        size = sum(p.numel() for p in trained.values())
        config = {
            "train_micro_batch_size_per_gpu": 1,  # the loop counts, not DeepSpeed
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self._stage,
                "reduce_bucket_size": min(size, _BUCKET),
                "overlap_comm": self.device.type == "cuda",
                "compute_grad_norm": False,  # `gradient_norm` does, before the step
            },
        }
        self._flat = _Flat(list(trained.values()))
        self._deepspeed, *_ = deepspeed.initialize(
            model=self.module, optimizer=self._flat, config=config
        )
        self.model = self._deepspeed
        pieces = []
        for name, parameter in trained.items():
            piece = _piece(name, parameter)
            pieces.append(piece)
            if parameter._hp_mapping is not None:
                start = parameter._hp_mapping.get_hp_fragment_address().start
                self._flat.places.append((piece.tensor, start, parameter))
        self._flat.optimizer = self.optimizer
        return pieces

    def zero_grad(self) -> None:
        self._deepspeed.optimizer.zero_grad()
        self._norms.begin()
        if not self.even:
            # Gradients add up locally, and are reduced once, when the block ends.
            self._collected.enter_context(self._deepspeed.coalesce_grad_reduction())

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if self.even:
            self._deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(self.scaled(loss))
        self._norms.passes += 1

    def _note_gradient(self, parameter: Tensor) -> None:
        if self._norms.passes == 0 and parameter.grad is not None:
            self._norms.add([parameter.grad])
            if self.on_gradient is not None:
                self.on_gradient([(parameter, parameter.grad)])

    def reduce(self) -> None:
        self._collected.close()
        for tensor, _, parameter in self._flat.places:
            index = parameter._index_in_param_group
            tensor.grad = parameter._hp_mapping.get_lp_grad_fragment(index).view(-1)

    def update(self) -> None:
        # The gradients that were clipped or unscaled are the memory that DeepSpeed now reads.
        self._deepspeed.step()


class _Flat(torch.optim.Optimizer):
    """The optimizer that DeepSpeed steps: passes each piece's gradient on to the real one."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.places: list[tuple[nn.Parameter, int, Any]] = []  # piece, offset, whole
        self.optimizer: torch.optim.Optimizer

    def step(self, closure: Any = None) -> Any:
        (partition,) = self.param_groups[0]["params"]
        for tensor, start, _ in self.places:
            tensor.grad = partition.grad[start : start + tensor.numel()]
        self.optimizer.step()
        for tensor, _, _ in self.places:
            tensor.grad = None


def _piece(name: str, parameter: Any) -> Piece:
    """Where DeepSpeed's map from low- to high-precision parameters has put a parameter."""
    mapping = parameter._hp_mapping
    if mapping is None:  # wholly in other ranks' partitions
        tensor = nn.Parameter(parameter.new_empty(0).float(), requires_grad=False)
        tensor.grad = torch.zeros_like(tensor)
        return Piece(name, parameter.shape, 0, tensor)
    flat = mapping.get_hp_fragment().detach()
    start = mapping.lp_fragment_address.start
    return Piece(name, parameter.shape, start, nn.Parameter(flat, requires_grad=False))
