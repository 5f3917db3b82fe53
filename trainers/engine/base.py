"""The engine as the loop sees it: processes, device and precision, and the calls of a step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler
from torch import Tensor, nn

from bigbatch.configs.clipping import Clip
from bigbatch.configs.errors import UserError
from bigbatch.trainers.engine.collectives import Collectives
from bigbatch.trainers.engine.gradient_norms import MicroBatchNorms
from bigbatch.trainers.engine.pieces import Pieces

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Engine(Collectives, ABC):
    """Data parallelism over gloo or NCCL for one model and its optimizer.

    A step is: `zero_grad`; `backward` inside `micro_batch` for each of this rank's
    micro-batches; `reduce`, after which every rank holds the mean gradient over all
    samples, or its pieces of it; `step` or `skip`. How gradients cross ranks, and who
    updates what, is each backend's own.
    """

    pieces: Pieces | None = None  # None: every rank holds all parameters and all state
    module: nn.Module  # the plain module
    model: nn.Module  # what goes forward: the module as its backend wraps it
    optimizer: torch.optim.Optimizer
    micro_batches: int  # of a step, over all ranks

    def __init__(
        self, precision: str, timeout_s: float, handlers: Sequence[KwargsHandler] = ()
    ) -> None:
        if precision == "fp16" and not torch.cuda.is_available():
            raise UserError("precision = fp16 needs a GPU; on CPU use fp32 or bf16")
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))
        self.accelerator = Accelerator(
            mixed_precision=_PRECISION[precision],
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[*handlers, group],
        )
        self.device: torch.device = self.accelerator.device
        # Called when the last of a step's gradients are on their way and the host only waits.
        self.on_sent: Callable[[], None] = lambda: None
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self._norms = MicroBatchNorms(self.device)

    @abstractmethod
    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int
    ) -> None:
        """Put the model on the device; a step is made of `micro_batches`, over all ranks."""

    @property
    def scaler(self) -> Any | None:
        """The loss scaler of fp16; None in the other precisions."""
        return self.accelerator.scaler

    @abstractmethod
    def zero_grad(self) -> None:
        """Begin a step."""

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """One forward and backward pass; `last` says that it is this rank's last in the step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss."""

    @abstractmethod
    def reduce(self) -> None:
        """Leave the mean gradient over all samples where `step` takes it from."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the averaged gradient, on the device, loss scale removed."""

    def micro_batch_sq(self) -> Tensor:
        """This rank's share of the mean squared gradient norm of a micro-batch, on the device.

        The sum over ranks is the mean over each rank's first micro-batch of the step, or over
        all of them where the backend sees each alone. Loss scale removed; to be called before
        `step`.
        """
        return self._first_micro_batch_sq(self.world / self.micro_batches, self.world)

    def _first_micro_batch_sq(self, loss_factor: float, taken: int) -> Tensor:
        """The squared norms added up, of losses times `loss_factor`, over `taken` of them."""
        scale = torch.ones((), device=self.device)
        if self.scaler is not None:
            scale = self.scaler.scale(scale)
        scale = scale * loss_factor
        return self._norms.total / (scale.double().square() * taken)

    @abstractmethod
    def clip(self, config: Clip, norm: Tensor) -> None:
        """Clip the averaged gradient, whose norm is `norm`."""

    @abstractmethod
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """The optimizer's update. fp16 with a non-finite gradient: no update, a lower scale."""

    def skip(self) -> None:
        """No update in this step. fp16: the scaler takes note of an overflow."""
        if self.scaler is not None:
            self.scaler.update()

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of the recipe, for passes outside the prepared model."""
        return self.accelerator.autocast()

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """A plain module with whole weights, to evaluate or to keep. Collective."""
        yield self.module

    def end_training(self) -> None:
        """Make `module` a plain one with whole weights, for good. Collective."""
