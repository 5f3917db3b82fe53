"""Gradient clipping against timm's and torch's own."""

import pytest
import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from bigbatch.configs.clipping import ClipAdaptive, ClipNorm, ClipValue
from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.trainers.optim.clip import clip_gradients, clip_units


def with_gradients(seed: int = 0, size: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=5, in_chans=1).double()
    for p in model.parameters():
        p.grad = torch.randn_like(p) * size * torch.rand(()).double()
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def clipped(config, size=1.0):
    model = with_gradients(size=size)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    clip_gradients(config, model, norm)
    return gradients(model)


@pytest.mark.parametrize("limit", [0.003, 0.1, 2.0])
@pytest.mark.parametrize("size", [0.01, 1.0])
def test_adaptive_clipping_is_timms_without_the_classifier(limit: float, size: float) -> None:
    model = with_gradients(size=size)
    before = gradients(model)
    body = [p for n, p in model.named_parameters() if not n.startswith("fc.")]
    adaptive_clip_grad(body, clip_factor=limit, eps=1e-3)
    expected = gradients(model)
    found = clipped(ClipAdaptive(name="adaptive", limit=limit), size)
    assert any(not torch.equal(before[n], found[n]) for n in found) or size < limit
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=0)
    for name in ("fc.weight", "fc.bias"):
        assert torch.equal(found[name], before[name])


def test_units_are_rows_and_zero_gradients_stay_zero() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])
    gradient = torch.tensor([[30.0, 40.0], [3.0, 4.0], [0.0, 0.0]])
    clip_units(gradient, weight, limit=0.1, eps=0.01)
    # |w| = 5, then eps, then no gradient at all: norms 0.5, 0.001 and 0.
    expected = torch.tensor([[0.3, 0.4], [0.0006, 0.0008], [0.0, 0.0]])
    torch.testing.assert_close(gradient, expected)


def test_clipping_by_norm_and_by_value_are_torchs() -> None:
    model = with_gradients()
    nn.utils.clip_grad_norm_(model.parameters(), 0.7)
    for name, gradient in clipped(ClipNorm(name="norm", limit=0.7)).items():
        torch.testing.assert_close(gradient, gradients(model)[name], rtol=1e-12, atol=0)
    before = gradients(with_gradients())
    for name, gradient in clipped(ClipValue(name="value", limit=0.1)).items():
        assert torch.equal(gradient, before[name].clamp(-0.1, 0.1))


def test_recipes_write_clipping_as_one_part() -> None:
    recipe = load_recipe("digits", ["clip={name: adaptive}"])
    assert recipe.clip == ClipAdaptive(name="adaptive", limit=0.01, eps=1e-3)
    assert load_recipe("digits").clip is None
    for override, says in (
        ("clip={name: norm}", "clip.limit: missing"),
        ("clip={name: norm, limit: 0}", "greater than 0"),
        ("clip={name: units, limit: 1}", "there are norm, value, adaptive"),
        ("clip_norm=1", "did you mean clip?"),
    ):
        with pytest.raises(UserError, match=says):
            load_recipe("digits", [override])
