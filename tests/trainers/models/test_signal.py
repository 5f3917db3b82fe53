"""Variance through a network: its definition, and networks that are known to be well or ill."""

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.configs.init import Init
from bigbatch.configs.load import load_recipe
from bigbatch.trainers.models.initialise import initialise
from bigbatch.trainers.models.signal import LayerSignal, judge, look, measure


def plain(activation: type[nn.Module], init: dict[str, Any] | None, depth: int = 20) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (3, *[16] * (depth - 1)):
        layers += [nn.Conv2d(inputs, 16, 3, padding=1), activation()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    if init is not None:
        initialise(model, Init.model_validate({"weights": init}), 0, "plain")
    return model


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 3, size, size), torch.randint(5, (8,))


def test_values_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 5))
    images, labels = batch(2)
    first, last = measure(model, images, labels)
    hidden = model[1](images.flatten(1)).detach().requires_grad_()
    logits = model[3](hidden.tanh())
    logits.retain_grad()
    F.cross_entropy(logits, labels, reduction="sum").backward()
    assert (first.name, last.name) == ("1", "3")
    assert first.forward == pytest.approx(hidden.var(correction=0).item(), rel=1e-5)
    assert last.forward == pytest.approx(logits.var(correction=0).item(), rel=1e-5)
    for layer, tensor in ((first, hidden), (last, logits)):
        assert layer.backward == pytest.approx(tensor.grad.square().mean().item(), rel=1e-5)
        assert layer.energy == pytest.approx(tensor.grad.square().sum().item() / 8, rel=1e-5)


@pytest.mark.parametrize(
    ("activation", "init", "state", "said"),
    [
        (nn.ReLU, {"name": "he"}, "ok", "energy at 42"),
        (nn.Tanh, {"name": "xavier"}, "ok", "energy"),
        (nn.ReLU, {"name": "xavier"}, "warning", "gradients vanish: gradients at 0 have"),
        (nn.ReLU, None, "warning", "gradients vanish"),  # torch's own
        (nn.ReLU, {"name": "normal", "std": 0.01}, "warning", "gradients vanish"),
        (nn.ReLU, {"name": "normal", "std": 0.5}, "warning", "the signal explodes: variance"),
        (nn.Tanh, {"name": "normal", "std": 1.0}, "warning", "gradients explode"),
    ],
)
def test_networks_whose_fate_is_known(
    activation: type[nn.Module], init: dict[str, Any] | None, state: str, said: str
) -> None:
    found = judge(measure(plain(activation, init), *batch()))
    assert found[0] == state, found
    assert said in found[1]
    assert ("model.init" in found[1]) == (state == "warning")


def test_what_is_no_number_has_exploded() -> None:
    assert judge([LayerSignal("a", math.nan)])[1].startswith("the signal explodes: variance nan")
    layers = [LayerSignal("a", 1, 1, math.inf), LayerSignal("b", 1, 1, 1)]
    assert judge(layers)[1].startswith("gradients explode")
    faint = [LayerSignal("a", 1e-20, 1, 1), LayerSignal("b", 1, 1, 1)]
    assert judge(faint)[1].startswith("the signal vanishes: variance 1e-20 after a")


def test_a_recipe_s_model_passes_and_what_cannot_be_said_is_skipped() -> None:
    usual = look(load_recipe("digits", []), 10, 1, 1)
    assert usual["state"] == "ok", usual
    assert "layers get no gradient at first, behind norms that start at 0" in usual["text"]
    assert usual["layers"][0]["name"] == "conv1.0"
    assert json.dumps(usual) == json.dumps(look(load_recipe("digits", []), 10, 1, 1))
    loaded = load_recipe("digits", ["model.pretrained=true"])
    assert look(loaded, 10, 1, 1)["text"] == "weights are loaded, not drawn"
    assert look(load_recipe("digits", []), 10, 10**9, 1)["state"] == "skipped"
