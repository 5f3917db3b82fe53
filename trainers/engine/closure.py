"""A step's loss and gradient again, at other weights: what L-BFGS asks for."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bigbatch.configs.errors import UserError
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.losses.build import Objective
from bigbatch.trainers.models.batch_stats import StepStatistics


class Closure:
    """Keeps this rank's micro-batches of a step, on the device, and evaluates them again.

    Each evaluation is that of the same samples, augmentation and dropout masks, over all
    ranks, so every rank sees the same loss and gradient and makes the same decisions. The
    first one is the loop's own, whose gradient lies in the parameters already.
    """

    def __init__(
        self,
        engine: Engine,
        statistics: StepStatistics,
        objective: Objective,
        micro_batches: int,
    ) -> None:
        self._engine = engine
        self._statistics = statistics
        self._objective = objective
        self._micro_batches = micro_batches
        self._kept: list[tuple[int, Tensor, Tensor]] = []

    def keep(self, seed: int, images: Tensor, targets: Tensor) -> None:
        """A micro-batch as the model gets it, and the seed that its forward pass started from."""
        self._kept.append((seed, images, targets))

    def of_step(self, mean_loss: float) -> Callable[[], float]:
        """The closure for the optimizer; `mean_loss` belongs to the gradients at hand."""
        known: list[float] = [mean_loss]

        def closure() -> float:
            return known.pop() if known else self._evaluate()

        return closure

    def forget(self) -> None:
        self._kept.clear()

    def _evaluate(self) -> float:
        engine = self._engine
        loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
        engine.zero_grad()
        self._statistics.begin()  # running statistics count a step once, at its first weights
        for number, (seed, images, targets) in enumerate(self._kept, 1):
            torch.manual_seed(seed)
            with engine.micro_batch(last=number == len(self._kept)):
                loss = self._objective(engine.model, images, targets)
                engine.backward(loss)
            loss_sum += loss.detach()
        self._statistics.discard()
        engine.reduce()
        mean = float(engine.sum(loss_sum)) / self._micro_batches
        if not (math.isfinite(mean) and math.isfinite(float(engine.gradient_norm()))):
            raise UserError(
                f"L-BFGS came to weights with loss {mean} inside a step; nothing of that step was "
                "saved. Lower optimizer.lr or set optimizer.line_search=strong_wolfe, then start "
                "a new run"
            )
        return mean
