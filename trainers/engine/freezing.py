"""Parts of a network that learn from some step on: frozen until then, on every backend."""

from typing import Any

import torch
from torch import nn

from bigbatch.trainers.engine.base import Engine
from bigbatch.trainers.optim.stages import NEVER, Learning, Waiting, module_starts


class Freezing:
    """Freezes what has not begun to learn yet, step by step.

    What is frozen at a step follows from its number alone, so that a run may be resumed, or go
    back, at any step. Frozen parameters have gradients of 0 (none at all where no other rank
    waits for them, which spares the pass through them), are left out of the optimizer's step,
    and stand in modules in evaluation: BatchNorm by its statistics, no dropout.
    """

    def __init__(
        self, learning: Learning, engine: Engine, optimizer: torch.optim.Optimizer, model: nn.Module
    ) -> None:
        """`model` is the plain module, which `engine` has prepared."""
        self._learning = learning
        self._engine = engine
        starts = module_starts(model, learning)
        self._modules = [(m, start) for m, start in starts.items() if start != NEVER]
        paths = {module: path for path, module in model.named_modules()}
        self._paths = {paths[module]: start for module, start in self._modules}
        self._waiting = Waiting(optimizer)
        self._frozen: set[str] | None = None

    def begin(self, step: int) -> list[str]:
        """Freeze for the step after `step` finished ones; the stages that begin with it."""
        self._waiting.step = step
        frozen = {n for n in self._learning.frozen(step) if self._learning.starts[n] != NEVER}
        if frozen != self._frozen:
            self._engine.freeze(frozen)
            self._frozen = frozen
        for module, start in self._modules:
            if module.training != (step >= start):  # evaluation has left all as it began
                module.training = step >= start
        return self._learning.begun(step)

    def keep_statistics(self, model: nn.Module, step: int) -> None:
        """Let BatchNorm of `model`, whole after `step` finished steps, keep its statistics where
        they are made anew and it has not trained: it is evaluated as the rest was trained on it."""
        for path, start in self._paths.items():
            kept: Any = model.get_submodule(path)
            kept.keeps_statistics = step <= start
