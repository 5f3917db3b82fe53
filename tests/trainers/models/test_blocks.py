"""Attention, pooling and activations against their formulas, and in whole models."""

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.configs.blocks import Activation
from bigbatch.configs.errors import UserError
from bigbatch.configs.model import Model
from bigbatch.data.rng import key64
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.models.blocks import GeneralisedMean, ScSE, Stochastic, find_stages
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.optim.groups import named_parameters


def built(name: str = "test_resnet", size: int = 32, **keys: Any) -> nn.Module:
    config = Model.model_validate({"name": name, **keys})
    return build_model(config, classes=5, channels=3, seed=0, image_size=size)


def images(size: int = 32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, size, size)


@pytest.mark.parametrize("kind", get_args(Activation))
def test_every_activation_of_torch_takes_relu_s_place(kind: str) -> None:
    model = built("test_resnet", activation=kind)
    swapped = [m for m in model.modules() if type(m) is getattr(nn, kind)]
    plain = [m for m in built().modules() if isinstance(m, nn.ReLU)]
    assert len(swapped) == len(plain) > 3
    assert torch.isfinite(model(images())).all()
    if kind == "PReLU":
        slopes = {n for n, p, is_plain in named_parameters(model) if is_plain}
        assert any(n.endswith("act1.weight") for n in slopes)


def test_gates_stay() -> None:
    model = built("test_efficientnet", activation="Mish")
    assert not any(isinstance(m, nn.SiLU | nn.ReLU) for m in model.modules())
    gates = [m for m in model.modules() if type(m).__name__ == "Sigmoid"]
    theirs = [m for m in built("test_efficientnet").modules() if type(m).__name__ == "Sigmoid"]
    assert len(gates) == len(theirs) > 0


def test_generalised_mean() -> None:
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    expected = x.pow(3).mean((2, 3), keepdim=True).pow(1 / 3)
    torch.testing.assert_close(GeneralisedMean(3)(x), expected)
    torch.testing.assert_close(GeneralisedMean(1)(x), x.mean((2, 3), keepdim=True))
    largest = GeneralisedMean(200)(x).detach()
    torch.testing.assert_close(largest, x.detach().amax((2, 3), keepdim=True), rtol=0.02, atol=0)
    assert torch.autograd.gradcheck(GeneralisedMean(3), (x,))


def test_stochastic_pooling_draws_values_in_proportion() -> None:
    x = torch.tensor([1.0, 3.0, -2.0, 4.0], dtype=torch.float64).view(1, 1, 2, 2)
    layer = Stochastic()
    torch.manual_seed(key64("a micro-batch"))
    drawn = layer.train()(x.expand(1, 20000, 2, 2)).flatten()
    for value, share in ((1.0, 1 / 8), (3.0, 3 / 8), (4.0, 4 / 8), (-2.0, 0.0)):
        assert (drawn == value).double().mean().item() == pytest.approx(share, abs=0.02)
    torch.manual_seed(key64("a micro-batch"))
    assert torch.equal(layer(x.expand(1, 20000, 2, 2)).flatten(), drawn)
    assert layer.eval()(x).item() == pytest.approx((1 + 9 + 16) / 8)
    dead = -torch.rand(2, 3, 2, 2)
    torch.testing.assert_close(layer(dead), dead.mean((2, 3), keepdim=True))
    assert layer.train()(dead).shape == (2, 3, 1, 1)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ({"name": "average"}, lambda x: x.mean((2, 3))),
        ({"name": "maximum"}, lambda x: x.amax((2, 3))),
        (
            {"name": "generalised_mean", "p": 2},
            lambda x: x.clamp(1e-6).square().mean((2, 3)).sqrt(),
        ),
    ],
)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_what_goes_into_the_classifier_is_pooled(kind: Any, formula: Any, name: str) -> None:
    model, plain = built(name, pool=kind).eval(), built(name).eval()
    maps: list[Tensor] = []
    at = plain.layer4 if hasattr(plain, "layer4") else plain.bn2
    at.register_forward_hook(lambda *call: maps.append(call[2]))
    plain(images())
    head = plain.fc if hasattr(plain, "fc") else plain.classifier
    torch.testing.assert_close(model(images()), head(formula(maps[0])))


def test_torchvision_s_pooling_too() -> None:
    name = "torchvision:resnet18"
    model = built(name, pool={"name": "maximum"}).eval()
    seen: list[Tensor] = []
    model.layer4.register_forward_hook(lambda *call: seen.append(call[2]))
    torch.testing.assert_close(model(images()), model.fc(seen[0].amax((2, 3))))


def test_scse_is_the_sum_of_both_excitations() -> None:
    torch.manual_seed(0)
    layer = ScSE(6, 3).double()
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    inner: Any = layer.channel
    squeezed = x.mean((2, 3))
    hidden = F.linear(squeezed, inner.fc1.weight.flatten(1), inner.fc1.bias).relu()
    channels = F.linear(hidden, inner.fc2.weight.flatten(1), inner.fc2.bias).sigmoid()
    places = (x * layer.place.weight[0][None]).sum(1, keepdim=True) + layer.place.bias
    expected = x * channels[:, :, None, None] + x * places.sigmoid()
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("se", "test_resnet"),
        ("cbam", "test_resnet"),
        ("scse", "test_resnet"),
        ("cbam", "test_efficientnet"),
        ("se", "convnext_atto"),
        ("scse", "torchvision:resnet18"),
    ],
)
def test_attention_ends_a_stage_whose_names_stay(kind: str, name: str) -> None:
    plain = built(name)
    model = built(name, attention={"name": kind, "stages": [2, 4], "reduction": 4})
    grown = [len(row) for row, _ in find_stages(model)]
    before = [len(row) for row, _ in find_stages(plain)]
    assert [g - b for g, b in zip(grown, before, strict=True)][:4] == [0, 1, 0, 1]
    assert plain.state_dict().keys() < model.state_dict().keys()
    added = model.state_dict().keys() - plain.state_dict().keys()
    loss = model.train()(images()).sum()
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter_name not in added or parameter.grad is not None
    with torch.device("meta"):
        built(name, attention={"name": kind, "stages": [2]})


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        (
            "test_resnet",
            {"attention": {"name": "se", "stages": [5]}},
            r"stages = \[5\]: test_resnet has 4 stages that end in maps, so there is no 5",
        ),
        ("lenet5", {"attention": {"name": "se", "stages": [1]}}, "lenet5 has 0 stages"),
        ("lenet5", {"pool": {"name": "average"}}, "lenet5 has no global pooling"),
        ("test_vit", {"pool": {"name": "average"}}, "test_vit has no global pooling"),
        ("torchvision:googlenet", {"activation": "GELU"}, "no activations that are modules"),
        ("test_resnet", {"recompute": True, "activation": "RReLU"}, "RReLU wrong gradients in tor"),
        ("nin", {"recompute": True}, "nin does not say where to cut it"),
    ],
)
def test_what_a_model_has_no_place_for(name: str, keys: dict[str, Any], said: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=said):
        built(name, **keys)


@pytest.mark.parametrize(
    "norm", [None, {"name": "batch_renorm"}, {"name": "ghost_batch", "samples": 2}]
)
def test_what_is_computed_again_is_the_same(norm: Any) -> None:
    """Gradients and statistics, dropout too, bit for bit."""
    found = []
    for again in (False, True):
        model = built(
            norm=norm, recompute=again, options={"drop_rate": 0.3, "drop_path_rate": 0.3}
        ).train()
        statistics = StepStatistics(model)
        statistics.begin()
        for number in range(2):
            torch.manual_seed(key64(number))
            model(images() + number).square().sum().backward()
            statistics.add()
        statistics.finish(statistics.local(), 2)
        gradients = {n: p.grad for n, p in model.named_parameters()}
        found.append({**gradients, **model.state_dict(keep_vars=False)})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
