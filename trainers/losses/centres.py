"""Centres of classes in the space of the classifier's input, which a loss learns.

They are a module below the classifier, so that checkpoints, ZeRO and FSDP2 see them. Weights that
are kept to be used, and networks that use them, are without: `is_centre` tells them by name.
"""

import torch
from torch import Tensor, nn

from bigbatch.trainers.losses.classification import cross_entropy
from bigbatch.trainers.optim.groups import linear_classifier

_NAME = "loss_centres"


class Centres(nn.Module):
    """One centre for each class: weight [C, D], 0 at the start."""

    no_decay = True  # trainers/optim/groups.py: it is no weight of the network

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(like.weight))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """|x - c|^2 / 2 of features [B, D], [B, C], twice: to move x by, and to move c by."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            return _half_squares(x, self.weight.detach()), _half_squares(x.detach(), self.weight)


class CentreLoss:
    """The loss [B] of logits and weights of labels, both [B, C], after a pass of `model`.

    Wen et al. 2016, equation 5: cross-entropy + weight / 2 |x - c|^2. The centres' gradient is
    that of rate / 2 |x - c|^2, which adds nothing to the value: with the weight in it they
    would hardly move. Theirs is the mean over a class's samples of a batch (equation 4), this
    one the sum over them, divided by the batch, so that it is the same however samples are
    spread over micro-batches.
    """

    def __init__(self, model: nn.Module, weight: float, rate: float) -> None:
        _, head = linear_classifier(model, "loss center")
        head.add_module(_NAME, Centres(head))
        self._weight, self._rate = weight, rate
        self._seen: tuple[Tensor, Tensor] | None = None
        # A function of its own: with a bound method, a copy of the model would copy this, too.
        head.register_forward_hook(lambda layer, inputs, _: self._keep(layer, inputs[0]))

    def _keep(self, layer: nn.Module, x: Tensor) -> None:
        centres = getattr(layer, _NAME, None)
        if layer.training and isinstance(centres, Centres):
            self._seen = centres(x)

    def __call__(self, logits: Tensor, weights: Tensor) -> Tensor:
        seen, self._seen = self._seen, None
        assert seen is not None, "the model's forward pass has not come to its classifier"
        pull, learn = ((weights * distance).sum(1) for distance in seen)
        moving = self._rate * (learn - learn.detach())
        return cross_entropy(logits, weights) + self._weight * pull + moving


def is_centre(name: str) -> bool:
    """Whether a tensor of this name is one of centres, and no weight of the network."""
    return _NAME in name.split(".")


def remove_centres(model: nn.Module) -> None:
    """The network alone, as it is used."""
    for module in model.modules():
        if _NAME in module._modules:
            del module._modules[_NAME]


def _half_squares(x: Tensor, centres: Tensor) -> Tensor:
    """|x - c|^2 / 2 for each row of both, [B, C], without B * C vectors."""
    own = x.square().sum(1, keepdim=True) + centres.square().sum(1)
    return own / 2 - x @ centres.T
