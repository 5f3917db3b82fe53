"""Weights that drop out, noise, and weights kept within a norm, against their formulas."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.regularise import Regularise
from bigbatch.trainers.models.regularise import keep_within, regularise


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(6, 40), nn.Linear(40, 5)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x))
        return out


def test_weights_of_the_classifier_drop_out_and_keep_their_mean() -> None:
    net = Net()
    names = list(net.state_dict())
    regularise(net, Regularise(drop_connect=0.25))
    assert list(net.state_dict()) == names
    net.fc.weight.data.fill_(1.0)
    net.fc.bias.data.fill_(0.0)
    torch.manual_seed(1)
    kept = net.fc(torch.eye(40))
    torch.manual_seed(1)
    assert torch.equal(net.fc(torch.eye(40)), kept)  # drawn from the stream that the loop seeds
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert (kept == 0).float().mean() == pytest.approx(0.25, abs=0.1)
    assert len({tuple(row) for row in (kept == 0).tolist()}) > 10  # single weights, not units
    net.eval()
    assert torch.equal(net.fc(torch.eye(40)), torch.ones(40, 5))


def test_noise_is_on_the_classifiers_input_in_training_alone() -> None:
    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    regularise(net, Regularise(input_noise=0.5))
    x = torch.randn(3, 6)
    torch.manual_seed(4)
    found = net(x)
    torch.manual_seed(4)
    torch.testing.assert_close(found, plain.fc(plain.body(x) + 0.5 * torch.randn(3, 40)))
    torch.manual_seed(4)
    assert torch.equal(copy.deepcopy(net)(x), found)
    net.eval()
    assert torch.equal(net(x), plain(x))


def test_a_classifier_that_is_another_kind_of_layer_is_refused() -> None:
    net = Net()
    regularise(net, Regularise(drop_connect=0.1))
    with pytest.raises(UserError, match=r"is for a plain linear classifier, .* DropConnectLinear"):
        regularise(net, Regularise(drop_connect=0.1))
    with pytest.raises(UserError, match="input_noise needs a model whose logits are one linear"):
        regularise(nn.Sequential(nn.Conv2d(1, 1, 1)), Regularise(input_noise=0.1))


def test_units_are_scaled_down_to_the_limit_after_each_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    keep_within(optimizer, model, 0.6)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model[0].weight.grad[3] = model[0].weight[3].detach()  # type: ignore[index]
    expected = [(p - p.grad).detach() for p in model.parameters()]
    optimizer.step()
    for found, free in zip(model.parameters(), expected, strict=True):
        if free.ndim == 1:  # biases and BatchNorm
            assert torch.equal(found, free)
            continue
        for unit, before in zip(found, free, strict=True):
            if before.norm() <= 0.6:
                assert torch.equal(unit, before)
            else:
                torch.testing.assert_close(unit, before * 0.6 / before.norm())
    assert torch.equal(model[0].weight[3], torch.zeros(3, 3, 3))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["regularise.l2=0.1", "optimizer.weight_decay=0.1"], "set one of them to 0"),
        (
            ["regularise.l2=1", "optimizer={weight_decay: 0, weight_decay_of: {fc: 0.1}}"],
            "a decay of 0.1",
        ),
        (["regularise.l1=0.1", "backend=fsdp2"], "holds in rows"),
        (["regularise.max_norm=3", "backend=zero1"], "max_norm needs whole neurons"),
        (["regularise.max_norm=3", "optimizer={name: lbfgs, lr: 1}", "clip=null"], "lbfgs compar"),
        (
            ["regularise.drop_connect=0.1", "loss={name: large_margin}", "augment.mixup=0"],
            "hides some of them; set it to 0",
        ),
        (["regularise.drop_connect=1"], "less than 1"),
        (["regularise.drop_path=0.1"], "unknown here; write model.options"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("digits", overrides)
