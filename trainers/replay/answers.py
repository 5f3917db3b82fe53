"""What a network answered in a pass, so that a loss may be asked again for each sample alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.trainers.optim.groups import linear_classifier


class Listening:
    """A model that remembers what it answered."""

    features: Tensor | None = None

    def __init__(self, model: Callable[..., Any]) -> None:
        self._model = model
        self.logits = torch.zeros(0)

    def __call__(self, images: Tensor) -> Tensor:
        self.logits = self._model(images)
        return self.logits


@dataclass(frozen=True)
class Said:
    logits: Tensor
    features: Tensor | None


class heard:
    """What the classifier gets, for losses that look at it: they would be asked by sample."""

    def __init__(self, model: nn.Module, loss: str) -> None:
        self._layer = None
        if loss in ("center", "large_margin"):
            self._layer = linear_classifier(model, f"loss {loss}")[1]
        self._inputs: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        self._handle = None
        if self._layer is not None:
            self._handle = self._layer.register_forward_pre_hook(
                lambda _, inputs: self._inputs.append(inputs[0])
            )
        return self._inputs

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            self._handle.remove()
