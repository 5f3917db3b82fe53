"""Structured pruning: whole channels go, and what is left computes what it should."""

import pytest
import torch
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.trainers.compress.structured import prune_channels
from tests.trainers.compress.networks import batch, network, same_state, state

IMAGES, _ = batch(2)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "size"), [("test_resnet", 32), ("test_efficientnet", 32), ("test_convnext", 32)]
)
def test_leaves_a_smaller_network_with_all_classes(name: str, size: int) -> None:
    model, fresh, (images, labels) = network(name, 3), network(name, 3), batch(2, 3, size)
    before = state(model)
    for batches in ((), [(images, labels)]):
        small = prune_channels(model, fresh, 0.5, images, batches)
        assert same_state(model, before)
        assert same_state(fresh, before)
        assert small(images).shape == (2, 10)
        assert parameters(small) < 0.4 * parameters(model)


class Plain(nn.Module):
    """A convolution, its norm, and a classifier, with channels that do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.norm(self.conv(images)).relu().mean((2, 3))
        return self.fc(features)

    def get_classifier(self) -> nn.Module:
        return self.fc


def test_channels_whose_weights_are_zero_go_and_nothing_changes() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    idle = [1, 3, 4]
    with torch.no_grad():
        model.conv.weight[idle] = 0
        model.norm.weight[idle] = 0
        model.fc.weight[:, idle] = 0
    small = prune_channels(model, Plain(), 0.5, IMAGES)
    rest = [0, 2, 5]
    assert torch.equal(small.conv.weight, model.conv.weight[rest])
    assert torch.equal(small.norm.running_mean, model.norm.running_mean[rest])
    assert torch.equal(small.fc.weight, model.fc.weight[:, rest])
    torch.testing.assert_close(small(IMAGES), model(IMAGES))


def test_the_result_is_the_network_with_those_channels_zeroed() -> None:
    """Of Plain, a channel that goes contributes what its column of the classifier says: nothing."""
    torch.manual_seed(1)
    model = Plain().eval()
    small = prune_channels(model, Plain(), 0.5, IMAGES)
    rest = [
        i for i in range(6) if any(torch.equal(model.conv.weight[i], w) for w in small.conv.weight)
    ]
    assert len(rest) == 3
    zeroed = Plain().eval()
    zeroed.load_state_dict(model.state_dict())
    with torch.no_grad():
        zeroed.fc.weight[:, [i for i in range(6) if i not in rest]] = 0
    torch.testing.assert_close(small(IMAGES), zeroed(IMAGES))


def test_taylor_scores_look_at_the_loss_and_magnitudes_do_not() -> None:
    """A channel of large weights that the classifier does not look at."""
    torch.manual_seed(2)
    model = Plain().eval()
    with torch.no_grad():
        model.conv.weight[0] *= 50
        model.norm.running_var[0] = 2500
        model.fc.weight[:, 0] = 0
    large = model.conv.weight[0]
    images, labels = batch(4)
    kept = [
        any(
            torch.equal(large, w)
            for w in prune_channels(model, Plain(), 0.5, IMAGES, b).conv.weight
        )
        for b in ((), [(images, labels % 4)])
    ]
    assert kept == [True, False]


def test_a_network_that_cannot_be_pruned_is_refused_with_a_remedy() -> None:
    images, _ = batch(2, 3, 160)
    model = network("test_vit", 3)
    with pytest.raises(UserError, match=r"cannot be pruned .* use --method prune or lowrank"):
        prune_channels(model, network("test_vit", 3), 0.5, images)
