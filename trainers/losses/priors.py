"""What the number of training samples of each class says to a loss: tensors [C] of float64."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bigbatch.configs.class_weights import BalancedWeights, EffectiveNumber, GivenWeights
from bigbatch.configs.errors import UserError


class ClassCounts(NamedTuple):
    """The classes of the training data, in the order of classes.txt, and their samples."""

    names: Sequence[str]
    samples: Sequence[int]


def class_weights(
    config: BalancedWeights | EffectiveNumber | GivenWeights, classes: ClassCounts
) -> Tensor:
    """Weights of labels whose mean over the training samples is 1.

    So the weighted loss is a plain mean over samples, and its size that of the unweighted one.
    torch divides by the weights of the batch at hand instead, so that a sample counts more
    beside light ones. Classes without samples get 0, but for given weights.
    """
    count = _tensor(classes.samples)
    match config:
        case BalancedWeights():
            weights = 1 / count
        case EffectiveNumber():
            weights = (1 - config.beta) / (1 - config.beta**count)
        case GivenWeights():
            check_length("loss.class_weights", len(config.values), classes)
            weights = _tensor(config.values)
    if not isinstance(config, GivenWeights):
        weights[count == 0] = 0.0
    total = (weights * count).sum()
    if total == 0:
        raise UserError(
            "loss.class_weights are 0 for every class that has training samples; give one that "
            "has a weight above 0"
        )
    return weights * count.sum() / total


def log_shares(classes: ClassCounts) -> Tensor:
    """The logarithm of each class's share of the training samples. UserError where one is 0."""
    _refuse_empty("loss logit_adjusted", classes)
    count = _tensor(classes.samples)
    return (count / count.sum()).log()


def ldam_margins(classes: ClassCounts, largest: float) -> Tensor:
    """n^(-1/4), scaled so that the rarest class has the largest (Cao et al. 2019, equation 10)."""
    _refuse_empty("loss ldam", classes)
    margins = _tensor(classes.samples) ** -0.25
    return largest * margins / margins.max()


def check_length(key: str, given: int, classes: ClassCounts) -> None:
    if given != len(classes.names):
        raise UserError(
            f"{key} has {given} values, and the data {len(classes.names)} classes; give one for "
            "each, in the order of classes.txt"
        )


def _refuse_empty(what: str, classes: ClassCounts) -> None:
    if empty := [name for name, count in zip(*classes, strict=True) if count == 0]:
        raise UserError(
            f"{what} goes by the number of training samples, and there is none of class "
            f"{empty[0]} ({len(empty)} of {len(classes.names)} classes); shard the data again, or "
            "take another loss"
        )


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
