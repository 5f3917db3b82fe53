"""Each norm against its formula in float64, and whatever else computes it."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import StdConv2d
from torch import Tensor, nn

from bigbatch.configs import norm as options
from bigbatch.configs.model import Model
from bigbatch.trainers.models import norm_layers as layers
from bigbatch.trainers.models.batch_stats import (
    StepStatistics,
    averaged_layers,
    check_state,
    recompute_statistics,
)
from bigbatch.trainers.models.convert import convert

CHANNELS = 6
NORMS: dict[str, Any] = {
    "group": options.Group(name="group", groups=3),
    "layer": options.Layer(name="layer"),
    "instance": options.Instance(name="instance"),
    "filter_response": options.FilterResponse(name="filter_response"),
    "local_response": options.LocalResponse(name="local_response", alpha=0.1),
    "batch_renorm": options.BatchRenorm(name="batch_renorm", r_max=1.5, d_max=0.2),
    "ghost_batch": options.GhostBatch(name="ghost_batch", samples=2),
    "frozen_batch": options.FrozenBatch(name="frozen_batch"),
}


def normed(norm: Any, size: int = 4) -> nn.Module:
    """A BatchNorm with weights of its own, swapped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS, momentum=0.2)).double()
    with torch.no_grad():
        for tensor in (*model.parameters(), model[0].running_mean, model[0].running_var):
            tensor.uniform_(0.5, 1.5)
    before = copy.deepcopy(model[0])
    images = torch.zeros(2, CHANNELS, size, size, dtype=torch.float64)
    convert(model, Model(name="own:net", norm=norm), images)
    for name, parameter in model[0].named_parameters():
        if name in ("weight", "bias"):
            assert torch.equal(parameter, getattr(before, name))  # kept
    return model[0]


def maps(count: int = 4, size: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, CHANNELS, size, size, dtype=torch.float64) * 2 + 0.5


def standardised(x: Tensor, dims: Any, eps: float) -> Tensor:
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dims, keepdim=True) + eps).sqrt()


def formula(name: str, x: Tensor, layer: Any) -> Tensor:
    weight, bias = (
        (layer.weight.view(-1, 1, 1), layer.bias.view(-1, 1, 1))
        if name != "local_response"
        else (1, 0)
    )
    b, c, h, w = x.shape
    match name:
        case "group":
            y = standardised(x.view(b, 3, -1), 2, 1e-5).view(b, c, h, w)
        case "layer":
            y = standardised(x, 1, 1e-5)
        case "instance":
            y = standardised(x, (2, 3), 1e-5)
        case "filter_response":
            y = x / (x.square().mean((2, 3), keepdim=True) + 1e-6).sqrt()
        case "local_response":
            squares = [x[:, max(0, i - 2) : i + 3].square().sum(1) for i in range(c)]
            y = x / (2 + 0.1 * torch.stack(squares, 1)) ** 0.75
        case "ghost_batch":
            y = torch.cat([standardised(part, (0, 2, 3), 1e-5) for part in x.split(2)])
        case "batch_renorm" if layer.reference is None:
            y = standardised(x, (0, 2, 3), 1e-5)
        case "batch_renorm":
            mean, var, _ = layer.reference
            mu = x.mean((0, 2, 3)).detach()
            std = ((x - mu.view(-1, 1, 1)).square().mean((0, 2, 3)) + 1e-5).sqrt().detach()
            r = (std / (var + 1e-5).sqrt()).clamp(1 / 1.5, 1.5).view(-1, 1, 1)
            d = ((mu - mean) / (var + 1e-5).sqrt()).clamp(-0.2, 0.2).view(-1, 1, 1)
            y = standardised(x, (0, 2, 3), 1e-5) * r + d
        case "frozen_batch":
            mean, var = layer.running_mean.view(-1, 1, 1), layer.running_var.view(-1, 1, 1)
            y = (x - mean) / (var + 1e-5).sqrt()
    return y * weight + bias


@pytest.mark.parametrize("name", NORMS)
def test_values_and_gradients_are_the_formula_s(name: str) -> None:
    layer = normed(NORMS[name]).train()
    if name == "batch_renorm":
        assert len(StepStatistics(layer).layers) == 1
        assert layer.reference is not None
    x = maps().requires_grad_()
    found = layer(x)
    expected = formula(name, x, layer)
    torch.testing.assert_close(found, expected)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad and p.ndim)]
    upstream = maps()
    for a, b in zip(
        torch.autograd.grad(found, wanted, upstream),
        torch.autograd.grad(expected, wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [n for n in NORMS if n != "batch_renorm"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    layer = normed(NORMS[name], size=2).train()
    for inner in layer.modules():
        if hasattr(inner, "momentum"):
            inner.momentum = 0.0  # the same statistics at each call
    assert torch.autograd.gradcheck(layer, (maps(4, 2).requires_grad_(),))


@pytest.mark.parametrize("name", NORMS)
def test_evaluation_mode_looks_at_each_image_alone(name: str) -> None:
    layer = normed(NORMS[name])
    layer.train()(maps())
    x = maps(6)
    torch.testing.assert_close(layer.eval()(x), torch.cat([layer(part) for part in x.split(1)]))


@pytest.mark.parametrize("name", ["batch_renorm", "ghost_batch"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_statistics_are_the_same_at_any_world_size(name: str, world: int) -> None:
    """And outputs: batch renorm looks at the statistics before the step, on every rank."""
    batches = [maps().float() + i for i in range(4)]
    models = [nn.Sequential(normed(NORMS[name])).float().train() for _ in range(world)]
    ranks = [StepStatistics(m) for m in models]
    outputs: dict[int, Tensor] = {}
    for _ in range(2):  # steps
        for rank, statistics in enumerate(ranks):
            statistics.begin()
            for number in range(rank, 4, world):
                outputs[number] = models[rank](batches[number])
                statistics.add()
        total = torch.stack([s.local() for s in ranks]).sum(0)
        for statistics in ranks:
            statistics.finish(total, 4)
    alone = nn.Sequential(normed(NORMS[name])).float().train()
    statistics = StepStatistics(alone)
    for _ in range(2):
        statistics.begin()
        for number, batch in enumerate(batches):
            last = alone(batch)
            statistics.add()
            if number == 0:
                first = last
        statistics.finish(statistics.local(), 4)
    assert torch.equal(outputs[0], first)
    assert torch.equal(outputs[3], last)
    for model in models:
        for name_, value in alone.state_dict().items():
            assert torch.equal(value, model.state_dict()[name_]), name_
    assert alone[0].num_batches_tracked == 2  # steps


def test_ghost_statistics_are_means_over_ghost_batches() -> None:
    layer = normed(NORMS["ghost_batch"]).train()
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = maps()
    layer(x)
    parts = [part.transpose(0, 1).flatten(1) for part in x.split(2)]
    torch.testing.assert_close(
        layer.running_mean, 0.8 * mean + 0.2 * torch.stack([p.mean(1) for p in parts]).mean(0)
    )
    torch.testing.assert_close(
        layer.running_var, 0.8 * var + 0.2 * torch.stack([p.var(1) for p in parts]).mean(0)
    )


def test_a_ghost_batch_of_the_whole_micro_batch_is_batch_norm() -> None:
    ghost = normed(options.GhostBatch(name="ghost_batch", samples=4)).train()
    plain = nn.BatchNorm2d(CHANNELS, momentum=0.2).double()
    plain.load_state_dict(normed(NORMS["ghost_batch"]).state_dict())
    assert torch.equal(ghost(maps()), plain(maps()))
    torch.testing.assert_close(ghost.running_var, plain.running_var)


def test_batch_renorm_s_limits_grow_with_finished_steps() -> None:
    norm = options.BatchRenorm(name="batch_renorm", r_max=1e6, d_max=1e6, ramp_steps=4)
    layer = normed(norm).train()
    statistics = StepStatistics(layer)
    x = maps()
    for done in range(6):
        statistics.begin()
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
        found = layer(x)
        if done == 0:
            expected = standardised(x, (0, 2, 3), 1e-5)  # plain BatchNorm
        elif done >= 4:  # nothing is clipped: the running statistics alone
            expected = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()
        if done in (0, 4, 5):
            scaled = expected * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
            torch.testing.assert_close(found, scaled)
        statistics.add()
        statistics.finish(statistics.local(), 1)


def test_batch_renorm_recomputes_statistics_without_old_ones() -> None:
    layers_ = nn.Sequential(normed(NORMS["batch_renorm"]), normed(NORMS["batch_renorm"]))
    training = StepStatistics(layers_)
    reference = layers_[0].reference
    batches = [maps() * 9, maps() + 1]
    recompute_statistics(layers_, batches, 2, lambda total: total)
    plain = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)).double()
    for a, b in zip(plain, (normed(NORMS["batch_renorm"]),) * 2, strict=True):
        a.load_state_dict(b.state_dict())
    recompute_statistics(plain, batches, 2, lambda total: total)
    for a, b in zip(plain, layers_, strict=True):
        torch.testing.assert_close(a.running_mean, b.running_mean)
        torch.testing.assert_close(a.running_var, b.running_var)
    assert layers_[0].reference is reference
    assert training.layers


def test_frozen_batch_norm_stays_frozen() -> None:
    """Trap 17: `model.train()` thaws torch's."""
    model = nn.Sequential(normed(NORMS["frozen_batch"]))
    before = copy.deepcopy(model.state_dict())
    statistics = StepStatistics(model.train())
    statistics.begin()
    model(maps())
    statistics.add()
    statistics.finish(statistics.local(), 1)
    recompute_statistics(model, [maps()], 1, lambda total: total)
    check_state(model, lambda m, x: m(x), maps())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert averaged_layers(model) == []
    assert not any(p.requires_grad for p in model.parameters())
    learning = normed(options.FrozenBatch(name="frozen_batch", train_affine=True))
    assert all(p.requires_grad for p in learning.parameters())


@pytest.mark.parametrize("name", NORMS)
def test_half_precision_gives_what_it_was_given(name: str) -> None:
    layer = normed(NORMS[name]).float().train()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(maps().bfloat16())
    torch.testing.assert_close(found.float(), layer(maps().float()), atol=0.1, rtol=0.05)
    assert torch.isfinite(found).all()


def test_standardised_weights() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    theirs = StdConv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=True).double()
    theirs.load_state_dict(conv.state_dict())
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(6 * 4, 2)).double()
    convert(model, Model(name="own:net", weight_standardization=True), None)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(model[0](x), theirs(x))
    w = conv.weight.detach().flatten(1).numpy()
    w = (w - w.mean(1, keepdims=True)) / (w.var(1, keepdims=True) + 1e-6) ** 0.5
    weight = torch.from_numpy(w).view_as(conv.weight)
    torch.testing.assert_close(model[0](x), F.conv2d(x, weight, conv.bias, 2, 1, groups=2))
    assert torch.autograd.gradcheck(model[0], (x,))


def test_cosine_head() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 3)).double()
    weight = model[1].weight
    head = options.CosineHead(name="cosine", scale=7, feature_norm="layer")
    convert(model, Model(name="own:net", head=head), None)
    features = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    normed_ = standardised(features, 1, 1e-5)
    expected = 7 * F.cosine_similarity(normed_[:, None], weight[None], dim=2)
    torch.testing.assert_close(model(features), expected)
    assert torch.autograd.gradcheck(model, (features,))
    assert set(model.state_dict()) == {"1.weight", "1.norm.weight", "1.norm.bias"}


@pytest.mark.parametrize("kind", ["layer", "batch", "l2"])
def test_feature_norm_before_a_linear_head(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 3)).double()
    plain = copy.deepcopy(model)
    scale = 3.0 if kind == "l2" else 1.0
    head = options.LinearHead(name="linear", feature_norm=kind, feature_scale=scale)
    convert(model, Model(name="own:net", head=head), None)
    x = torch.randn(4, 5, dtype=torch.float64)
    if kind == "l2":
        expected = 3 * x / x.norm(dim=1, keepdim=True)
    else:
        expected = standardised(x, 1 if kind == "layer" else 0, 1e-5)
    torch.testing.assert_close(model.train()(x), plain(expected))
    assert len(averaged_layers(model)) == (kind == "batch")
    assert isinstance(model[1], layers.NormedLinear)
