"""Low-rank factorisation: a layer becomes two smaller ones, by singular values."""

import copy

import torch
from torch import Tensor, nn

from bigbatch.trainers.models.compressed import factor_pair
from bigbatch.trainers.optim.groups import classifiers

Layer = nn.Conv2d | nn.Linear


def factorise(
    model: nn.Module, *, share: float | None = None, energy: float | None = None
) -> nn.Module:
    """A copy of the network, its layers as pairs of which each has fewer weights than the layer.

    Ranks are chosen layer by layer: `share` of its weights go, or the pair keeps `energy` of
    the sum of its squared singular values. Left as they are: the first convolution and the
    classifier, whose few weights all others depend on; grouped convolutions; subclasses that
    compute in ways of their own; and layers of which no pair would be smaller. Raises
    ValueError unless one of the two is given.
    """
    if (share is None) == (energy is None):
        raise ValueError(f"share {share} and energy {energy}: give one of them")
    network = copy.deepcopy(model)
    for name, layer in _factorable(network):
        if share is not None:
            rank = rank_of_share(layer, share)
        else:
            assert energy is not None
            rank = rank_of_energy(layer, energy)
        if rank * _weights_a_rank(layer) < layer.weight.numel():
            network.set_submodule(name, factor(layer, rank))
    return network


def _factorable(network: nn.Module) -> list[tuple[str, Layer]]:
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, Layer)]
    kept = {id(m) for m in classifiers(network)} | {id(m) for _, m in layers[:1]}
    return [
        (name, layer)
        for name, layer in layers
        if id(layer) not in kept
        and type(layer) in (nn.Conv2d, nn.Linear)
        and getattr(layer, "groups", 1) == 1
    ]


@torch.no_grad()
def factor(layer: Layer, rank: int) -> nn.Sequential:
    """The pair of layers nearest to `layer` in the squares of weights, of at most this rank.

    W [out, in * k * k] = U S V^T; a k x k layer of `rank` filters sqrt(S) V^T, then a 1 x 1
    layer U sqrt(S), which has the bias (Zhang et al. 2016, arXiv:1505.06798, section 3.1, with
    the weights' own least squares; Denton et al. 2014, arXiv:1404.0736). Of full rank it
    computes the same. Raises ValueError for a rank that the matrix does not have.
    """
    matrix = layer.weight.flatten(1)
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank {rank} of a matrix {list(matrix.shape)}")
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    roots = s[:rank].sqrt()
    pair = factor_pair(layer, rank)
    state = {
        "0.weight": (roots[:, None] * v[:rank]).view(rank, *layer.weight.shape[1:]),
        "1.weight": (u[:, :rank] * roots).view(-1, rank, *(1,) * (layer.weight.ndim - 2)),
    }
    if layer.bias is not None:
        state["1.bias"] = layer.bias
    pair.load_state_dict(state)
    return pair


def _weights_a_rank(layer: Layer) -> int:
    return sum(layer.weight.flatten(1).shape)


def rank_of_share(layer: Layer, share: float) -> int:
    """The largest rank, at least 1, at which a pair has (1 - share) of the layer's weights."""
    kept = (1 - share) * layer.weight.numel() + 1e-9  # 0.1 of 1,000 are 100, not 99
    return max(1, min(int(kept / _weights_a_rank(layer)), *layer.weight.flatten(1).shape))


def rank_of_energy(layer: Layer, energy: float) -> int:
    """The smallest rank that keeps `energy` of the sum of squared singular values."""
    squares: Tensor = torch.linalg.svdvals(layer.weight.detach().double().flatten(1)).square()
    reached = squares.cumsum(0) >= energy * squares.sum()
    return min(int((~reached).sum()) + 1, len(squares))
