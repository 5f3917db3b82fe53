"""The classifier of a model, for losses that look at more than its logits."""

from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.trainers.optim.groups import classifiers, linear_classifier


def cosine_scale(model: nn.Module | None) -> float | None:
    """What a cosine head multiplies its cosines by; None where the model has no such head."""
    heads = [] if model is None else classifiers(model)
    scale = getattr(heads[0], "scale", None) if len(heads) == 1 else None
    return scale if isinstance(scale, float) else None


class WatchedClassifier:
    """What a model's linear classifier got and is, in the newest forward pass of training.

    Taken inside the pass, where every backend holds whole weights.
    """

    def __init__(self, model: nn.Module, why: str) -> None:
        self._seen: tuple[Tensor, Tensor | None] | None = None
        # A function of its own: with a bound method, a copy of the model would copy this, too.
        linear_classifier(model, why)[1].register_forward_hook(
            lambda layer, inputs, _: self._keep(layer, inputs[0])
        )

    def _keep(self, layer: Any, features: Tensor) -> None:
        if layer.training:
            x, w = _precise(features), _precise(layer.weight)
            lengths = x.norm(dim=1, keepdim=True) * w.norm(dim=1)
            self._seen = lengths, None if layer.bias is None else _precise(layer.bias)

    def take(self) -> tuple[Tensor, Tensor | None]:
        """|x| |w| of each sample and class, [B, C], and the bias [C]; forgotten then."""
        seen, self._seen = self._seen, None
        assert seen is not None, "the model's forward pass has not come to its classifier"
        return seen


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
