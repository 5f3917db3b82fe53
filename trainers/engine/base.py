"""The engine as the loop sees it: processes, device and precision, and the calls of a step."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    TorchDynamoPlugin,
)
from torch import Tensor, nn

from bigbatch.configs.clipping import Clip
from bigbatch.configs.errors import UserError
from bigbatch.trainers.engine.collectives import Collectives
from bigbatch.trainers.engine.compiled import as_written, compile_network, forget_compiled
from bigbatch.trainers.engine.determinism import choose_algorithms
from bigbatch.trainers.engine.gradient_norms import MicroBatchNorms
from bigbatch.trainers.engine.host_memory import keep_freed_memory
from bigbatch.trainers.engine.pieces import Pieces
from bigbatch.trainers.planning.environment import asks_for_cpu, check_environment

# Of parameters and their gradients, those of one micro-batch, which another tensor may hold next.
Look = Callable[[Iterable[tuple[Tensor, Tensor]]], None]
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Engine(Collectives, ABC):
    """Data parallelism over gloo or NCCL for one model and its optimizer.

    A step is: `begin`; `backward` inside `micro_batch` for each of this rank's
    micro-batches; `reduce`, after which every rank holds the mean gradient over all
    samples, or its pieces of it; `step` or `skip`. How gradients cross ranks, and who
    updates what, is each backend's own.
    """

    pieces: Pieces | None = None  # None: every rank holds all parameters and all state
    module: nn.Module  # the plain module
    model: nn.Module  # what goes forward: the module as its backend wraps it
    optimizer: torch.optim.Optimizer
    micro_batches: int  # of this step, over all ranks

    def __init__(
        self,
        precision: str,
        timeout_s: float,
        handlers: Sequence[KwargsHandler] = (),
        *,
        deterministic: bool = False,
    ) -> None:
        check_environment(os.environ)
        choose_algorithms(deterministic=deterministic)
        cpu = asks_for_cpu(os.environ) or not torch.cuda.is_available()
        if precision == "fp16" and cpu:
            raise UserError("precision = fp16 needs a GPU; on CPU use fp32 or bf16")
        if cpu:
            keep_freed_memory()
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))
        # Whatever is not given here, accelerate and torch take from the environment.
        self.accelerator = Accelerator(
            mixed_precision=_PRECISION[precision],
            cpu=cpu,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(
                backend=DynamoBackend.NO,
                mode="default",
                fullgraph=False,
                dynamic=False,
                use_regional_compilation=False,
            ),
            kwargs_handlers=[*handlers, group],
        )
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True  # torch's default
        self.device: torch.device = self.accelerator.device
        # Called when the last of a step's gradients are on their way and the host only waits.
        self.on_sent: Callable[[], None] = lambda: None
        # Called, maybe in parts, with a micro-batch's own gradient, this rank's first one's or
        # each (`sees_each`), before it is added to others. Not on fsdp2, which has it in no place.
        self.on_gradient: Look | None = None
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self._norms = MicroBatchNorms(self.device)
        self.frozen: frozenset[str] = frozenset()  # parameters that wait to learn
        self._watched: set[str] = set()  # that have waited, and are held back where they do

    @abstractmethod
    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int
    ) -> None:
        """Put the model on the device; a step is made of `micro_batches`, over all ranks.

        Where steps have different numbers of them, of a multiple of that; `begin` says of which.
        """

    @property
    def in_round(self) -> bool:
        """Whether this step is a round, in which workers train apart."""
        return False

    def train_apart(self, workers: int, each: int, clip: Clip | None) -> None:
        """Let steps of more than workers x each micro-batches be rounds of post-local SGD.

        In a round each worker makes updates of `each` micro-batches, clipped by `clip`, and `step`
        takes their average. After `prepare`; of DDP with exact sums alone.
        """
        raise NotImplementedError

    def _fix_parameters(self) -> None:
        """Remember what is trained: of anything that joins later no rank would tell the others."""
        self._fixed = {n: (p, p.requires_grad) for n, p in self.module.named_parameters()}

    def changed_parameters(self) -> list[str]:
        """What `prepare` has not seen: parameters that woke up, froze, or took another's place."""
        now = dict(self.module.named_parameters())
        changed = []
        for name, parameter in now.items():
            known, trained = self._fixed.get(name, (parameter, False))
            if parameter.requires_grad != trained:
                change = "froze" if trained else "woke up" if name in self._fixed else "is new"
                changed.append(f"{name} {change}")
            elif trained and parameter is not known:
                changed.append(f"{name} was replaced")
        return changed + [f"{n} is gone" for n, (_, t) in self._fixed.items() if t and n not in now]

    def refuse_changes(self, step: int, changed: list[str], ranks: float) -> None:
        """Raise UserError on every rank where `changed_parameters` are found on any."""
        if ranks:
            found = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
            raise UserError(
                f"step {step}: parameters of the model changed since the start: "
                f"{found or 'on another rank'}; ranks exchange gradients of those alone that were "
                "trained at the start, so that this one would differ between ranks. The weights "
                "were not touched. Set requires_grad before training starts, and start a new run "
                "to train others; transfer (docs/transfer.md) lets parts begin at a step"
            )

    def freeze(self, names: Collection[str]) -> None:
        """Let these parameters, and no others of those trained, take no gradient until told anew.

        Ranks exchange gradients of all that will ever be trained, so those of frozen ones are 0
        from the start of their way: in norms, clipping and the exchange alike.
        """
        self.frozen = frozenset(names)
        for name, parameter in self.module.named_parameters():
            if name in self.frozen and name not in self._watched:
                self._watched.add(name)
                parameter.register_hook(partial(self._held_back, name))

    def _held_back(self, name: str, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if name in self.frozen else gradient

    @property
    def scaler(self) -> Any | None:
        """The loss scaler of fp16; None in the other precisions."""
        return self.accelerator.scaler

    def begin(self, micro_batches: int) -> None:
        """Begin a step of so many micro-batches, over all ranks."""
        self.micro_batches = micro_batches
        self.zero_grad()

    @abstractmethod
    def zero_grad(self) -> None:
        """Begin a step of as many micro-batches as the last one, or begin it again."""

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """One forward and backward pass; `last` says that it is this rank's last in the step."""

    @property
    def sees_each(self) -> bool:
        """Whether each micro-batch's gradient is seen alone, and not a rank's first one's only."""
        return False

    def scaled(self, loss: Tensor) -> Tensor:
        """What `backward` differentiates: the mean over ranks becomes the mean over all samples."""
        return self._loss_scaled(loss * (self.world / self.micro_batches))

    def _loss_scaled(self, loss: Tensor) -> Tensor:
        if self.scaler is None:
            return loss
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

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
        """This rank's squared gradient norms of micro-batches, added up, on the device.

        Those of its first micro-batch of the step, or of all of them where the backend sees each
        alone: over all ranks there are `micro_batches_measured`. Loss scale removed; to be called
        before `step`.
        """
        return self._measured_sq(self.world / self.micro_batches)

    @property
    def micro_batches_measured(self) -> int:
        """How many micro-batches of a step `micro_batch_sq` adds up, over all ranks."""
        return min(self.world, self.micro_batches)  # a rank may have none

    def _measured_sq(self, loss_factor: float) -> Tensor:
        """The squared norms added up, of losses times `loss_factor`."""
        scale = torch.ones((), device=self.device)
        if self.scaler is not None:
            scale = self.scaler.scale(scale)
        scale = scale * loss_factor
        return self._norms.total / scale.double().square()

    def layer_gradient_norms(self) -> dict[str, float]:
        """The L2 norm of the averaged gradient of each trained weight that is no vector, by name.

        What is frozen in this step is left out: its 0 says nothing of the network. Collective;
        after `gradient_norm`, which removes the loss scale, and before `clip`.
        """
        own = self.own_weights()
        whole = {name: tensor.shape for name, tensor in own.items()}
        if self.pieces is not None:
            whole = {piece.name: piece.whole for piece in self.pieces.pieces}
        names = [n for n, shape in whole.items() if len(shape) > 1 and n not in self.frozen]
        squares = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        for i, name in enumerate(names):
            if (gradient := own[name].grad) is not None and gradient.numel():
                squares[i] = torch.linalg.vector_norm(gradient).double().square()
        if self.pieces is not None:
            self.sum(squares)
        return dict(zip(names, squares.sqrt().tolist(), strict=True))

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
        with as_written(self.module):
            yield self.module

    def compile(self) -> None:
        """Compile what goes forward in training; after `prepare`, where parameters stay whole.

        Raises UserError where this machine cannot.
        """
        compile_network(self.module, self.device)

    def end_training(self) -> None:
        """Make `module` a plain one with whole weights, for good. Collective."""
        forget_compiled(self.module)

    def own_weights(self) -> dict[str, Tensor]:
        """What this rank's optimizer updates, by name: trained parameters, or pieces of them."""
        if self.pieces is not None:
            return {piece.name: piece.tensor for piece in self.pieces.pieces}
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def whole(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Whole tensors, on every rank, from values of the form of `own_weights`. Collective."""
        return values
