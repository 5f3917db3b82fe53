"""Initial weights: their distribution, and what they depend on."""

import math
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from bigbatch.configs.errors import UserError
from bigbatch.configs.init import Init
from bigbatch.configs.model import Model
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.models.initialise import initialise, prior_bias

# Scheme, and the variance of a weight [64, 32, 3, 3]: fan in 288, fan out 576.
SCHEMES: list[tuple[dict[str, Any], float]] = [
    ({"name": "normal", "std": 0.02}, 0.02**2),
    ({"name": "uniform", "std": 0.02}, 0.02**2),
    # Of a normal cut at 2: 1 - 2 * 2 phi(2) / (2 Phi(2) - 1).
    ({"name": "truncated_normal", "std": 0.02}, 0.02**2 * 0.7737),
    ({"name": "xavier"}, 2 / (288 + 576)),
    ({"name": "xavier", "distribution": "normal", "gain": 3}, 9 * 2 / (288 + 576)),
    ({"name": "he"}, 2 / 576),
    ({"name": "he", "distribution": "uniform", "fan": "in"}, 2 / 288),
    ({"name": "he", "nonlinearity": "leaky_relu", "slope": 0.5}, 2 / 1.25 / 576),
    ({"name": "he", "nonlinearity": "linear"}, 1 / 576),
    ({"name": "he", "nonlinearity": "tanh"}, (5 / 3) ** 2 / 576),
    ({"name": "orthogonal", "gain": 2}, 4 / 288),
]


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 9))


def drawn(seed: int = 0, model: nn.Module | None = None, **keys: Any) -> Any:
    model = net() if model is None else model
    initialise(model, Init.model_validate(keys), seed, "net")
    return model


@pytest.mark.parametrize(("scheme", "variance"), SCHEMES, ids=str)
def test_weights_have_the_variance_of_their_formula(
    scheme: dict[str, Any], variance: float
) -> None:
    weight = drawn(weights=scheme)[0].weight.detach().double()
    assert weight.mean().abs() < 4 * math.sqrt(variance / weight.numel())
    assert weight.var().item() == pytest.approx(variance, rel=0.04)
    kind = scheme.get("distribution", scheme["name"])
    largest = weight.abs().max().item() / math.sqrt(variance)
    if kind == "uniform" or scheme == {"name": "xavier"}:
        assert largest == pytest.approx(math.sqrt(3), rel=1e-3)
    elif kind == "truncated_normal":
        assert largest == pytest.approx(2 / math.sqrt(0.7737), rel=0.01)
    elif kind in ("normal", "he"):
        assert 3.5 < largest < 6


def test_orthogonal_rows() -> None:
    weight = drawn(weights={"name": "orthogonal", "gain": 2})[0].weight.detach().flatten(1)
    torch.testing.assert_close(weight @ weight.T, 4 * torch.eye(64), atol=1e-4, rtol=0)


def test_values_depend_on_seed_and_name_alone() -> None:
    """Neither on torch's stream, nor on what else there is, nor on its order."""
    scheme = {"name": "normal", "std": 1.0}
    first = drawn(weights=scheme)
    torch.manual_seed(99)
    again = drawn(weights=scheme)
    wrapped = nn.Module()
    wrapped.extra = nn.Linear(3, 3)
    for name, child in net().named_children():
        wrapped.add_module(name, child)
    drawn(model=wrapped, weights=scheme)
    for name in ("0.weight", "3.weight"):
        value = first.state_dict()[name]
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, wrapped.state_dict()[name])
        assert not torch.equal(value, drawn(seed=1, weights=scheme).state_dict()[name])
    stream = torch.get_rng_state()
    drawn(weights=scheme)
    assert not torch.equal(stream, torch.get_rng_state())  # of `net`, which draws its own
    model, stream = net(), torch.get_rng_state()
    drawn(model=model, weights=scheme)
    assert torch.equal(stream, torch.get_rng_state())


def test_what_is_not_named_stays() -> None:
    model = net()
    before = {n: p.clone() for n, p in model.named_parameters()}
    drawn(model=model, bias=0.25)
    for name, parameter in model.named_parameters():
        if name in ("0.bias", "3.bias"):
            assert (parameter == 0.25).all()
        else:  # the bias of a norm too
            assert torch.equal(parameter, before[name])


def test_no_values_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert drawn(weights={"name": "he"})[0].weight.is_meta


@pytest.mark.parametrize("name", ["resnet10t", "resnet26", "torchvision:resnet18"])
def test_zero_gamma_makes_each_block_its_shortcut(name: str) -> None:
    plain = {"zero_init_last": False} if ":" not in name else {}
    for zero in (False, True):
        keys = {"init": {"zero_gamma": True}} if zero else {}
        config = Model.model_validate({"name": name, "options": plain, **keys})
        model = build_model(config, classes=5, channels=3, seed=0).eval()
        kinds = (
            BasicBlock,
            Bottleneck,
            torchvision_resnet.BasicBlock,
            torchvision_resnet.Bottleneck,
        )
        blocks: list[Any] = [m for m in model.modules() if isinstance(m, kinds)]
        assert blocks
        for block in blocks:
            x = torch.rand(2, block.conv1.in_channels, 8, 8)
            shortcut = x if block.downsample is None else block.downsample(x)
            assert torch.equal(block(x), shortcut.relu()) is zero


def test_the_prior_is_what_a_fresh_classifier_says() -> None:
    counts = [900, 90, 10, 0]
    bias = prior_bias(counts, sigmoids=False)
    share = torch.tensor([900, 90, 10, 1], dtype=torch.float64) / 1001
    torch.testing.assert_close(bias.softmax(0), share)
    torch.testing.assert_close(prior_bias(counts, sigmoids=True).sigmoid(), share)
    config = Model.model_validate({"name": "test_resnet", "init": {"head_prior": True}})
    model = build_model(config, classes=4, channels=3, seed=0, head_prior=bias)
    assert torch.equal(model.get_classifier().bias, bias.float())


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("lenet5", {"zero_gamma": True}, "lenet5 has no residual blocks that name their last"),
        ("nin", {"head_prior": True}, "one linear layer's; the classifier of this one is Conv2d"),
    ],
)
def test_what_a_model_has_no_place_for(name: str, keys: dict[str, Any], said: str) -> None:
    config = Model.model_validate({"name": name, "init": keys})
    with pytest.raises(UserError, match=said):
        build_model(config, classes=4, channels=3, seed=0, head_prior=torch.zeros(4))
