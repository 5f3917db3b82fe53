"""What the sharded engines share: an optimizer over pieces, and norms over all of them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from bigbatch.configs.clipping import Clip, ClipNorm, ClipValue
from bigbatch.trainers.engine.base import Engine
from bigbatch.trainers.engine.pieces import Piece, Pieces


class ShardedEngine(Engine):
    """Each rank holds the optimizer state of its pieces of the parameters, and updates those.

    Gradients are averaged as DDP averages them. Where the micro-batches of a step do not
    divide evenly among the ranks, ranks pass through the model unequally often, so nothing
    may cross ranks but in each one's last pass (`even` is false).
    """

    pieces: Pieces

    def __init__(
        self, precision: str, timeout_s: float = 600, *, deterministic: bool = False
    ) -> None:
        super().__init__(precision, timeout_s, deterministic=deterministic)
        torch.backends.cudnn.benchmark = not deterministic
        if self.accelerator.scaler is not None:
            # Agrees among ranks on whether any piece of the gradient overflowed.
            self.accelerator.scaler = ShardedGradScaler(device=self.device.type)

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int
    ) -> None:
        self.micro_batches = micro_batches
        self.even = micro_batches % self.world == 0  # and so are all its multiples
        self.optimizer = optimizer
        parameters = dict(model.named_parameters())
        # FSDP2 takes no other layout, and DeepSpeed flattens to this one.
        pieces = self.shard(model.to(memory_format=torch.contiguous_format).to(self.device))
        self._fix_parameters()
        self.pieces = Pieces(self.module, pieces)
        self.pieces.adopt(optimizer, parameters)
        self._pieces = [piece.tensor for piece in pieces]
        self._stepper = _Stepper(optimizer, self.update)

    @abstractmethod
    def shard(self, model: nn.Module) -> list[Piece]:
        """Set `module` and `model`; return this rank's pieces of the trained parameters."""

    @abstractmethod
    def update(self) -> None:
        """The optimizer's update of the pieces, and of what depends on them."""

    def gradient_norm(self) -> Tensor:
        if self.scaler is not None:
            self.scaler.unscale_(self._stepper)
        local = nn.utils.get_total_norm(self._piece_gradients()).double().square()
        norm: Tensor = self.sum(local).sqrt().to(self._pieces[0].dtype)
        return norm

    def clip(self, config: Clip, norm: Tensor) -> None:
        match config:
            case ClipNorm():
                nn.utils.clip_grads_with_norm_(self._pieces, config.limit, norm)
            case ClipValue():
                nn.utils.clip_grad_value_(self._pieces, config.limit)
            case _:
                raise AssertionError("the recipe refuses adaptive clipping of pieces")

    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None, "the recipe refuses L-BFGS on pieces"
        if self.scaler is None:
            self.update()
        else:
            self.scaler.step(self._stepper)
            self.scaler.update()

    def whole(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        wholes = self.pieces.whole(values)
        for piece in self.pieces.pieces:
            if self.rank != 0:
                wholes[piece.name] = values[piece.name].new_empty(piece.whole)
            dist.broadcast(wholes[piece.name], 0)
        return wholes

    def _piece_gradients(self) -> list[Tensor]:
        return [p.grad for p in self._pieces if p.grad is not None]


class _Stepper:
    """What a loss scaler needs of an optimizer: gradients to look at, and a step to skip."""

    def __init__(self, optimizer: torch.optim.Optimizer, update: Callable[[], None]) -> None:
        self.param_groups = optimizer.param_groups
        self.step = update
