"""Unstructured pruning: the weights that matter least become 0, wherever they are."""

import copy
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Batch = tuple[Tensor, Tensor]  # normalised images [B, C, H, W], labels int64 [B]


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers, by name; biases and norms stay whole."""
    return {
        f"{name}.weight": layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, _ConvNd | nn.Linear)
    }


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """|w| of each prunable weight (Han et al. 2015, arXiv:1506.02626, section 3)."""
    return {name: weight.detach().abs() for name, weight in prunable(model).items()}


def taylor_scores(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """|w dL/dw| of each prunable weight, summed over batches.

    What the loss would change by, to first order, if the weight were 0 (Molchanov et al. 2019,
    arXiv:1906.10771, eq. 7, without the square). L is the mean cross-entropy of a batch; the
    network is in eval mode.
    """
    network = copy.deepcopy(model).eval().requires_grad_(True)
    weights = prunable(network)
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for images, labels in batches:
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            scores[name] += (weight.detach() * weight.grad).abs()
    return scores


def masks_of(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """False where one of the lowest scores is, over all tensors together; True elsewhere.

    Exactly round(share * N) of N are False; of equal scores, those that come first.
    """
    everything = torch.cat([score.flatten() for score in scores.values()])
    kept = torch.ones(len(everything), dtype=torch.bool, device=everything.device)
    kept[everything.argsort(stable=True)[: round(share * len(everything))]] = False
    parts = kept.split([score.numel() for score in scores.values()])
    return {
        name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put 0 where the masks are False, in place."""
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        weights[name].masked_fill_(~mask.to(weights[name].device), 0)  # 0, never -0


def prune(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network without the masked weights."""
    network = copy.deepcopy(model)
    apply_masks(network, masks)
    return network
