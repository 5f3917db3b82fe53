"""Factorisation by singular values: what is lost, and what is left alone."""

import pytest
import torch
from torch import nn

from bigbatch.trainers.compress.lowrank import (
    factor,
    factorise,
    rank_of_energy,
    rank_of_share,
)
from bigbatch.trainers.models.compressed import reshape
from tests.trainers.compress.networks import batch, network, same_state, state

LAYERS = {
    "3x3": nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "no bias, dilated": nn.Conv2d(8, 12, 3, padding=2, dilation=2, bias=False),
    "1x1": nn.Conv2d(8, 12, 1),
    "uneven": nn.Conv2d(4, 6, (1, 5), padding=(0, 2), padding_mode="circular"),
    "linear": nn.Linear(9, 7),
    "linear, no bias": nn.Linear(5, 11, bias=False),
}


def inputs(layer: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        return torch.randn(3, layer.in_features, generator=generator)
    return torch.randn(2, layer.in_channels, 10, 10, generator=generator)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_of_full_rank_a_pair_computes_what_the_layer_does(layer: nn.Conv2d | nn.Linear) -> None:
    x = inputs(layer)
    pair = factor(layer, min(layer.weight.flatten(1).shape))
    torch.testing.assert_close(pair(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_what_a_rank_loses_are_the_singular_values_behind_it(
    layer: nn.Conv2d | nn.Linear,
) -> None:
    """Eckart and Young 1936: the squared distance is the sum of the tail's squares."""
    matrix = layer.weight.detach().double().flatten(1)
    tail = torch.linalg.svdvals(matrix)
    for rank in range(1, len(tail) + 1):
        first, second = factor(layer, rank)
        product = second.weight.double().flatten(1) @ first.weight.double().flatten(1)
        lost = (product - matrix).square().sum().sqrt()
        torch.testing.assert_close(lost, tail[rank:].square().sum().sqrt(), atol=1e-5, rtol=1e-5)


def test_a_rank_that_there_is_not_is_refused() -> None:
    for rank in (0, 8):
        with pytest.raises(ValueError, match=rf"rank {rank} of a matrix \[7, 9\]"):
            factor(nn.Linear(9, 7), rank)


def test_ranks_follow_the_share_of_weights_and_the_energy() -> None:
    layer = nn.Conv2d(16, 32, 3)
    for share in (0.1, 0.5, 0.9):
        rank = rank_of_share(layer, share)
        one = 16 * 9 + 32
        assert rank * one <= (1 - share) * layer.weight.numel() + 1e-6 < (rank + 1) * one
    assert rank_of_share(nn.Linear(2, 2), 0.9) == 1
    diagonal = nn.Linear(4, 4)
    diagonal.weight.data = torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0]))  # squares 16 4 4 1 of 25
    energies = (0.1, 0.64, 0.65, 0.8, 0.81, 0.96, 0.97, 0.9999)
    assert [rank_of_energy(diagonal, e) for e in energies] == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_a_network_becomes_smaller_and_is_known_again_by_its_tensors(name: str) -> None:
    size = 160 if name == "test_vit" else 32
    model, (images, _) = network(name, 3), batch(2, 3, size)
    before = state(model)
    small = factorise(model, share=0.5)
    assert same_state(model, before)
    weights = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert weights[0] < 0.75 * weights[1]
    again = network(name, 3, seed=1)
    reshape(again, small.state_dict())
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.eval()(images), small(images))


def test_first_convolution_classifier_and_grouped_ones_stay() -> None:
    model = network("test_efficientnet", 3)
    pairs = {
        name for name, m in factorise(model, share=0.5).named_modules() if type(m) is nn.Sequential
    } - {name for name, m in model.named_modules() if type(m) is nn.Sequential}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert pairs <= layers.keys()
    assert pairs
    first = next(iter(layers))
    assert first not in pairs
    assert "classifier" in layers
    assert "classifier" not in pairs
    grouped = {n for n, m in layers.items() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert grouped
    assert not grouped & pairs


def test_all_energy_makes_no_pair_and_neither_or_both_is_a_mistake() -> None:
    model, (images, _) = network(), batch()
    assert torch.equal(factorise(model, energy=0.999999999)(images), model(images))
    for wrong in ({}, {"share": 0.5, "energy": 0.5}):
        with pytest.raises(ValueError, match="give one of them"):
            factorise(model, **wrong)
