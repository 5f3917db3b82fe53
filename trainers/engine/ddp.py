"""DDP: every rank holds all parameters and all state, and gradients are averaged."""

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from bigbatch.configs.clipping import Clip
from bigbatch.trainers.engine.base import Engine
from bigbatch.trainers.engine.local import LocalRounds
from bigbatch.trainers.optim.clip import clip_gradients


class DdpEngine(Engine):
    """Plain data parallelism. There are two ways to the mean gradient:

    overlapped: DDP. Ranks exchange gradients while the last micro-batch's backward pass
    still runs. float32 sums are taken in an order that depends on the world size.

    exact: gradients of micro-batches are added up in float64 and exchanged after the last
    one. Those sums are exact but for about one rounding in 2^28, so the float32 mean is the
    same, bit for bit, at any world size. Twice the traffic, and none of it hidden.
    """

    def __init__(
        self,
        precision: str,
        reduction: str,
        timeout_s: float = 600,
        *,
        deterministic: bool = False,
    ) -> None:
        # Running statistics are ours to average (batch_stats.py): DDP must not broadcast rank 0's.
        # DDP puts gradients into other buckets after its first step, and so adds them up in
        # another order (findings/torch-ddp-first-step.sh), but where it looks for unused ones.
        ddp = DistributedDataParallelKwargs(
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=deterministic,
        )
        super().__init__(precision, timeout_s, [ddp], deterministic=deterministic)
        self.exact = reduction == "exact"
        self._rounds: LocalRounds | None = None
        self._round: LocalRounds | None = None  # the same, in a step that is one
        # The fastest kernels, found by trying; a run and its resumption may choose differently.
        torch.backends.cudnn.benchmark = not (self.exact or deterministic)

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int
    ) -> None:
        self.module = model.to(self.device)
        self.optimizer = optimizer
        self.micro_batches = micro_batches
        with warnings.catch_warnings():
            # torch 2.15 renames broadcast_buffers; accelerate and older torch know no other.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            self._wrapped = self.accelerator.prepare_model(self.module, evaluation_mode=self.exact)
        self.model = self._wrapped
        self._alone = False
        self._stepper = self.accelerator.prepare_optimizer(optimizer)
        self._fix_parameters()
        named = self.module.named_parameters()
        self._names = {p: name for name, p in named if p.requires_grad}
        self._trained = list(self._names)
        if self.exact:
            sizes = [p.numel() for p in self._trained]
            self._sum = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
            parts = zip(self._sum.split(sizes), self._trained, strict=True)
            self._sums = [part.as_strided(p.shape, p.stride()) for part, p in parts]
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel):
            self._wrapped.register_comm_hook(None, self._send)

    @property
    def in_round(self) -> bool:
        return self._round is not None

    def train_apart(self, workers: int, each: int, clip: Clip | None) -> None:
        self._rounds = LocalRounds(
            self.module,
            self.optimizer,
            workers=workers,
            each=each,
            clip=clip,
            ranks=(self.rank, self.world),
            total=self.sum,
        )

    def begin(self, micro_batches: int) -> None:
        # DDP's own exchange is one of ranks that go backward: without a rank that has nothing to do
        # it would wait for ever. Then none goes through DDP, and `reduce` adds gradients up.
        self._alone = micro_batches < self.world and not self.exact
        self.model = self.module if self._alone else self._wrapped
        super().begin(micro_batches)
        rounds = self._rounds
        self._round = rounds if rounds and micro_batches > rounds.micro_batches else None
        if self._round is not None:
            self._round.begin()

    def freeze(self, names: Collection[str]) -> None:
        if self._wrapped is not self.module:  # DDP waits for the gradient of each
            super().freeze(names)
            return
        frozen = set(names)
        for parameter, name in self._names.items():
            parameter.requires_grad_(name not in frozen)
            if name in frozen:
                parameter.grad = None
        self._fix_parameters()

    def zero_grad(self) -> None:
        self._stepper.zero_grad(set_to_none=False)
        self._norms.begin()
        if self.exact:
            self._sum.zero_()

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if self._round is not None:
            self._round.enter()
        self._reducing = last and self.world > 1 and not self._alone
        plain = last or self.exact or self._alone
        with nullcontext() if plain else self.accelerator.no_sync(self.model):
            yield

    @property
    def sees_each(self) -> bool:
        return self.exact

    def scaled(self, loss: Tensor) -> Tensor:
        return self._loss_scaled(loss) if self.exact else super().scaled(loss)

    def backward(self, loss: Tensor) -> None:
        if self.exact:
            self.accelerator.backward(loss)
            self._look()
            if self._round is not None:
                if self._round.add():
                    self._round.update(self._stepper.step)
            else:
                for part, parameter in zip(self._sums, self._trained, strict=True):
                    if parameter.grad is not None:
                        part.add_(parameter.grad)
            self._stepper.zero_grad(set_to_none=False)
        else:
            # The mean over ranks, which DDP takes, becomes the mean over all samples.
            self.accelerator.backward(loss * (self.world / self.micro_batches))
            if self._norms.passes == 0 and not self._reducing:
                self._look()
        self._norms.passes += 1

    def _look(self) -> None:
        """Of gradients that stand alone."""
        self._norms.add(self._gradients())
        if self.on_gradient is not None:
            self.on_gradient([(p, p.grad) for p in self._trained if p.grad is not None])

    def _send(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's own all-reduce of a bucket of gradients, after a look at them."""
        if self.on_gradient is not None and self._norms.passes == 0:
            self.on_gradient(zip(bucket.parameters(), bucket.gradients(), strict=True))
        sent = self._norms.hook(state, bucket)
        if bucket.is_last():
            self.on_sent()
        return sent

    def reduce(self) -> None:
        if self._round is not None:
            self._round.average()
            return
        if self.micro_batches < self.world:
            self._have_gradients()
        if self._alone:
            gradients = self._gradients()
            whole = self.sum(torch.cat([g.flatten() for g in gradients])).div_(self.world)
            for gradient, part in zip(
                gradients, whole.split([g.numel() for g in gradients]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))
        if self.exact:
            self.sum(self._sum).div_(self.micro_batches)
            for part, parameter in zip(self._sums, self._trained, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(part)

    def _have_gradients(self) -> None:
        """Give a rank that has never gone backward the gradients that others have, as zeros."""
        there = [float(p.grad is not None) for p in self._trained]
        anywhere = self.sum(torch.tensor(there, device=self.device)).tolist()
        for parameter, found in zip(self._trained, anywhere, strict=True):
            if found and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def gradient_norm(self) -> Tensor:
        self.accelerator.unscale_gradients()
        return nn.utils.get_total_norm(self._gradients())

    def micro_batch_sq(self) -> Tensor:
        if self.exact:  # every micro-batch stands alone, and its loss is not scaled
            return self._measured_sq(1.0)
        return super().micro_batch_sq()

    @property
    def micro_batches_measured(self) -> int:
        return self.micro_batches if self.exact else super().micro_batches_measured

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._trained if p.grad is not None]

    def clip(self, config: Clip, norm: Tensor) -> None:
        if not self.in_round:  # whose updates have been clipped one by one
            clip_gradients(config, self.module, norm)

    def step(self, closure: Callable[[], float] | None = None) -> None:
        if self._round is not None:
            self._round.take()
        else:
            self._stepper.step(closure)
