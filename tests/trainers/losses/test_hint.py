"""Attention of a layer against its formula in float64, and which passes are watched."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.configs.distill import Hint, SoftTargets
from bigbatch.configs.errors import UserError
from bigbatch.configs.losses import CrossEntropy
from bigbatch.trainers.losses.build import build_student_objective
from bigbatch.trainers.losses.hint import Watched, area_weights, attention, attention_transfer


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def area_mean(row: np.ndarray, grid: int) -> list[float]:
    """Means of a step function over equal cells, from its integral."""
    integral = np.concatenate([[0], np.cumsum(row)])
    edges = np.linspace(0, len(row), grid + 1)
    at = np.interp(edges, np.arange(len(row) + 1), integral)
    return (np.diff(at) * grid / len(row)).tolist()


@pytest.mark.parametrize(("size", "grid"), [(8, 8), (12, 4), (7, 3), (10, 8), (3, 8), (1, 4)])
def test_cells_are_means_by_area(size: int, grid: int) -> None:
    row = maps(size)
    np.testing.assert_allclose(area_weights(size, grid) @ row, area_mean(row.numpy(), grid))
    if size % grid == 0:
        square = maps(1, 1, size, size)
        pooled = F.adaptive_avg_pool2d(square, grid)[0, 0]
        weights = area_weights(size, grid)
        torch.testing.assert_close(weights @ square[0, 0] @ weights.T, pooled)


def test_attention_is_the_papers_and_its_difference_has_the_right_gradient() -> None:
    features = maps(3, 5, 6, 4)
    energy = (features.numpy() ** 2).mean(1)
    cells = energy.reshape(3, 2, 3, 2, 2).mean((2, 4)).reshape(3, 4)
    expected = cells / np.sqrt((cells**2).sum(1, keepdims=True))
    np.testing.assert_allclose(attention(features, 2), expected, rtol=1e-12)
    taught = attention(maps(3, 7, 8, 8, seed=1), 2)
    loss = attention_transfer(features, taught)
    assert loss.item() == pytest.approx(((expected - taught.numpy()) ** 2).mean(), rel=1e-12)
    assert attention_transfer(features, attention(3 * features, 2)).item() < 1e-30
    assert torch.autograd.gradcheck(
        lambda x: attention_transfer(x, taught), features.requires_grad_()
    )
    assert attention(features.half(), 2).dtype == torch.float32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maps, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 5)
        self.idle = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.maps(x).mean((2, 3)))
        return out


def test_a_hint_adds_its_weight_times_the_difference() -> None:
    net, images = Net().double(), maps(2, 1, 8, 8)
    labels, theirs = torch.eye(5, dtype=torch.float64)[:2], maps(2, 5).log_softmax(1)
    taught = attention(maps(2, 3, 9, 9), 3)
    config = SoftTargets(name="soft", teacher="a", hint=Hint(layer="maps", grid=3, weight=7.0))
    objective = build_student_objective(CrossEntropy(), config, net)
    found = objective(net, images, torch.cat([labels, theirs, taught], 1))
    without = config.model_copy(update={"hint": None})
    plain = build_student_objective(CrossEntropy(), without, net)(
        net, images, torch.cat([labels, theirs], 1)
    )
    expected = plain + 7 * attention_transfer(net.maps(images), taught)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    found.backward()
    assert net.maps.weight.grad is not None


def test_only_passes_of_the_models_mode_are_watched_and_those_of_copies() -> None:
    net, images = Net(), torch.zeros(2, 1, 8, 8)
    watched = Watched(net, "maps", "the student")
    net(images)
    net.eval()(images[:1])
    assert len(watched.take()) == 2
    copy.deepcopy(net).train()(images[:1])
    assert len(watched.take()) == 1
    with pytest.raises(UserError, match="layer maps of the student gives NoneType, and a hint"):
        watched.take()
    frozen = Watched(net, "maps", "teacher a")
    net(images)
    assert not frozen.take().isnan().any()


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("map", r"the student has no layer 'map'; it has maps, \.\.\."),
        ("", r"the student has no layer ''; it has maps, head, idle, \.\.\."),
        ("head", r"layer head of the student gives \[2, 5\], and a hint needs maps"),
        ("idle", r"layer idle of the student gives NoneType"),
    ],
)
def test_a_layer_without_maps_is_named(layer: str, said: str) -> None:
    def watch() -> None:
        net = Net()
        watched = Watched(net, layer, "the student")
        net(torch.zeros(2, 1, 8, 8))
        watched.take()

    with pytest.raises(UserError, match=said):
        watch()
