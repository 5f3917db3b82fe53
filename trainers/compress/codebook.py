"""Codebooks: each tensor keeps a few values, and for each weight the number of one of them."""

import copy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bigbatch.trainers.compress.pruning import prunable
from bigbatch.trainers.models.compressed import CODEBOOK, INDICES, decode, pack

_ROUNDS = 300  # usual ones end after some tens


def cluster(
    values: npt.NDArray[np.float32], count: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """K-means of numbers [N]: centroids [count], ascending, and each number's, [N].

    Lloyd's rounds from centroids that stand evenly between the smallest and the largest number,
    which keep the rare large weights (Han et al. 2016, arXiv:1510.00149, section 3.2), until
    nothing moves. Numbers in a row are sorted once, so that a cluster is a range of them, its
    mean a difference of sums. A centroid that is nearest to none stays where it is.
    """
    order = np.argsort(values, kind="stable")
    ascending = values[order].astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ascending)])
    centroids = np.linspace(ascending[0], ascending[-1], count)
    ends = np.full(count - 1, -1)
    for _ in range(_ROUNDS):
        before, ends = ends, np.searchsorted(ascending, (centroids[:-1] + centroids[1:]) / 2)
        if (before == ends).all():
            break
        starts, stops = np.append(0, ends), np.append(ends, len(values))
        sizes = stops - starts
        means = (sums[stops] - sums[starts]) / np.maximum(sizes, 1)
        centroids = np.where(sizes > 0, means, centroids)
    indices = np.empty(len(values), np.uint8)
    indices[order] = np.searchsorted(ends, np.arange(len(values)), side="right")
    return centroids.astype(np.float32), indices


def encode(model: nn.Module, bits: int) -> dict[str, Tensor]:
    """The network's tensors, those of convolutions and linear layers as 2^bits values each.

    Such a tensor X becomes X.codebook [2^bits] and X.indices, uint8 with `bits` for each
    weight. Tensors that this would not make smaller stay as they are.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for name in prunable(model):
        values = tensors[name].float().numpy().ravel()
        if values.size * (32 - bits) <= 32 << bits:
            continue
        centroids, indices = cluster(values, 1 << bits)
        del tensors[name]
        tensors[name + CODEBOOK] = torch.from_numpy(centroids)
        tensors[name + INDICES] = torch.from_numpy(pack(indices, bits))
    return tensors


def share_weights(model: nn.Module, bits: int) -> nn.Module:
    """A copy of the network as `encode` keeps it: at most 2^bits values in a tensor."""
    network = copy.deepcopy(model)
    network.load_state_dict(decode(encode(model, bits), model))
    return network
