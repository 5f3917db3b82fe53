"""The engine: processes, devices, precision and collectives, through Accelerate.

The only module that imports accelerate. The loop sees this class alone: it is DDP, and the
interface that the sharded backends (engine_zero, engine_fsdp) fill in their own way.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from bigbatch.configs.clipping import Clip
from bigbatch.configs.errors import UserError
from bigbatch.trainers.engine.gradient_norms import MicroBatchNorms
from bigbatch.trainers.engine.pieces import Shards
from bigbatch.trainers.optim.clip import clip_gradients

_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",  # gloo, to a peer that went while it was sent to
    "remote process exited",  # NCCL
)
_TOLD = "bigbatch/told"  # the store's key for: rank 0 has told of an error
_RANK_0_SPEAKS_IN_S = 3
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Engine:
    """Data parallelism over gloo or NCCL for one model and its optimizer.

    A step is: `zero_grad`; `backward` inside `micro_batch` for each of this rank's
    micro-batches; `reduce`, after which every rank holds the mean gradient over all
    samples; `step`. There are two ways to the mean:

    overlapped: DDP. Ranks exchange gradients while the last micro-batch's backward pass
    still runs. float32 sums are taken in an order that depends on the world size.

    exact: gradients of micro-batches are added up in float64 and exchanged after the last
    one. Those sums are exact but for about one rounding in 2^28, so the float32 mean is the
    same, bit for bit, at any world size. Twice the traffic, and none of it hidden.
    """

    shards: Shards | None = None  # None: every rank holds all parameters and all state

    def __init__(self, precision: str, reduction: str, timeout_s: float = 600) -> None:
        if precision == "fp16" and not torch.cuda.is_available():
            raise UserError("precision = fp16 needs a GPU; on CPU use fp32 or bf16")
        self.exact = reduction == "exact"
        # Running statistics are ours to average (norm.py): DDP must not broadcast rank 0's.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))
        self.accelerator = Accelerator(
            mixed_precision=_PRECISION[precision],
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[ddp, group],
        )
        self.device: torch.device = self.accelerator.device
        # The fastest kernels, found by trying; a run and its resumption may choose differently.
        torch.backends.cudnn.benchmark = not self.exact
        # Called when the last of a step's gradients are on their way and the host only waits.
        self.on_sent: Callable[[], None] = lambda: None
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int
    ) -> None:
        """Put the model on the device; a step is made of `micro_batches`, over all ranks."""
        self.module = model.to(self.device)
        self.optimizer = optimizer
        self.micro_batches = micro_batches
        with warnings.catch_warnings():
            # torch 2.15 renames broadcast_buffers; accelerate and older torch know no other.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            self.model = self.accelerator.prepare_model(self.module, evaluation_mode=self.exact)
        self._stepper = self.accelerator.prepare_optimizer(optimizer)
        self._trained = [p for p in self.module.parameters() if p.requires_grad]
        if self.exact:
            sizes = [p.numel() for p in self._trained]
            self._sum = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
            parts = zip(self._sum.split(sizes), self._trained, strict=True)
            self._sums = [part.as_strided(p.shape, p.stride()) for part, p in parts]
        self._begin_norms()
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.register_comm_hook(None, self._send)

    def _begin_norms(self) -> None:
        self._norms = MicroBatchNorms(self.device)
        self._norms_taken = self.micro_batches if self.exact else self.world

    @property
    def scaler(self) -> Any | None:
        """The loss scaler of fp16; None in the other precisions."""
        return self.accelerator.scaler

    def zero_grad(self) -> None:
        self._stepper.zero_grad(set_to_none=False)
        self._norms.begin()
        if self.exact:
            self._sum.zero_()

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """One forward and backward pass; `last` says that it is this rank's last in the step."""
        self._reducing = last and self.world > 1
        with nullcontext() if last or self.exact else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss."""
        if self.exact:
            self.accelerator.backward(loss)
            self._norms.add(self._gradients())
            for part, parameter in zip(self._sums, self._trained, strict=True):
                if parameter.grad is not None:
                    part.add_(parameter.grad)
            self._stepper.zero_grad(set_to_none=False)
        else:
            # The mean over ranks, which DDP takes, becomes the mean over all samples.
            self.accelerator.backward(loss * (self.world / self.micro_batches))
            if self._norms.passes == 0 and not self._reducing:
                self._norms.add(self._gradients())
        self._norms.passes += 1

    def _send(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's own all-reduce of a bucket of gradients, after a look at them."""
        sent = self._norms.hook(state, bucket)
        if bucket.is_last():
            self.on_sent()
        return sent

    def reduce(self) -> None:
        """Leave the mean gradient over all samples in each parameter's grad."""
        if self.exact:
            self.sum(self._sum).div_(self.micro_batches)
            for part, parameter in zip(self._sums, self._trained, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(part)

    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the averaged gradient, on the device, loss scale removed."""
        self.accelerator.unscale_gradients()
        return nn.utils.get_total_norm(self._gradients())

    def micro_batch_sq(self) -> Tensor:
        """This rank's share of the mean squared gradient norm of a micro-batch, on the device.

        The sum over ranks is the mean over all micro-batches of the step (exact), or over
        each rank's first (overlapped). Loss scale removed; to be called before `step`.
        """
        scale = torch.ones((), device=self.device)
        if self.scaler is not None:
            scale = self.scaler.scale(scale)
        if not self.exact:
            scale = scale * (self.world / self.micro_batches)
        return self._norms.total / (scale.double().square() * self._norms_taken)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._trained if p.grad is not None]

    def clip(self, config: Clip, norm: Tensor) -> None:
        clip_gradients(config, self.module, norm)

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """The optimizer's update. fp16 with a non-finite gradient: no update, a lower scale."""
        self._stepper.step(closure)

    def skip(self) -> None:
        """No update in this step. fp16: the scaler takes note of an overflow."""
        if self.scaler is not None:
            self.scaler.update()

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of the recipe, for passes outside the prepared model."""
        return self.accelerator.autocast()

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """A plain module with whole weights, to evaluate or to keep. Collective."""
        yield self.module

    def end_training(self) -> None:
        """Make `module` a plain one with whole weights, for good. Collective."""

    # Collectives. With one process each is a copy of its argument.

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value (None, a number, text, or lists and dicts of those) on every rank."""
        if self.world > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0, device=self.device)
            value = box[0]
        return value

    def gather_rows(self, rows: Tensor, capacity: int) -> list[np.ndarray] | None:
        """Every rank's rows [n, K] on rank 0, in rank order; None on the other ranks.

        `capacity` is at least the largest n of any rank: collectives need equal shapes.
        """
        if self.world == 1:
            return [rows.cpu().numpy()]
        padded = rows.new_zeros((capacity + 1, *rows.shape[1:]))
        padded[: len(rows)] = rows
        padded[-1] = len(rows)  # the count travels as one more row; exact below 2^24
        parts = [torch.empty_like(padded) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(padded, parts)
        if parts is None:
            return None
        arrays = [part.cpu().numpy() for part in parts]
        return [a[: int(a[-1].flat[0])] for a in arrays]

    def speaks(self) -> bool:
        """Whether this rank tells the user of the error that ends it.

        Most errors meet all ranks, and rank 0 tells them; another rank speaks where rank 0
        says nothing within seconds, for then it has met the error alone.
        """
        if self.world == 1:
            return True
        store = dist.distributed_c10d._get_default_store()
        if self.rank == 0:
            store.set(_TOLD, "")
            return True
        try:
            store.wait([_TOLD], timedelta(seconds=_RANK_0_SPEAKS_IN_S))
        except dist.DistStoreError:  # the wait has timed out
            return True
        except dist.DistError:  # the store went with rank 0, which has spoken
            pass
        return False

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, as gloo and NCCL say it."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER)
