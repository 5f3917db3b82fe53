"""Muon against its formulas in float64, against torch's and timm's, and beside its second one."""

import copy
import functools

import numpy as np
import pytest
import timm.optim.muon
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from bigbatch.configs.clipping import ClipAdaptive, ClipNorm
from bigbatch.configs.errors import UserError
from bigbatch.configs.optimizers import LAMB as LambConfig
from bigbatch.configs.optimizers import SGD, AdamW, Optimizer
from bigbatch.configs.optimizers import Muon as MuonConfig
from bigbatch.trainers.models.regularise import keep_within
from bigbatch.trainers.optim import build_optimizer, set_lr, set_momentum, trust_ratios
from bigbatch.trainers.optim.clip import clip_gradients
from bigbatch.trainers.optim.muon import COEFFICIENTS, Muon, adjusted, orthogonalise
from tests.helpers.optim_reference import (
    RATES,
    ReferenceMuon,
    as_array,
    assert_alike,
    make_layers,
    orthogonal,
    run,
    run_reference,
)

WITHOUT = ("vector",)
SHAPES = [(1, 9), (5, 5), (5, 9), (4, 8), (3, 40), (6, 200)]  # of both forms


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_follows_the_formula(adjust_lr, nesterov, weight_decay):
    params, grads = make_layers(torch.float64)
    del params["vector"]
    params["tall"] = nn.Parameter(torch.randn(30, 4, dtype=torch.float64))
    for row in grads:
        row["tall"] = torch.randn(30, 4, dtype=torch.float64)
    options = {"adjust_lr": adjust_lr, "nesterov": nesterov, "weight_decay": weight_decay}
    references = {
        name: ReferenceMuon(as_array(p), momentum=0.8, **options) for name, p in params.items()
    }
    run(Muon(params.values(), lr=1.0, momentum=0.8, **options), params, grads, RATES)
    run_reference(references, grads, RATES)
    for name, p in params.items():
        np.testing.assert_allclose(as_array(p), references[name].w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape, steps):
    x = torch.randn(3, *shape, dtype=torch.float64)
    x[1] = 0
    found = orthogonalise(x, steps, "fp32")
    for one, made in zip(x, found, strict=True):
        np.testing.assert_allclose(made.numpy(), orthogonal(one.numpy(), steps), atol=1e-10)
    assert not found[1].any()


@pytest.mark.parametrize("kind", ["normal", "decaying", "rank 8"])
@pytest.mark.parametrize("shape", [(32, 40), (32, 64), (32, 300)])
def test_rounding_stays_small_whatever_the_singular_values(shape, kind):
    """Also on the small side, where an error would grow with each step (restarts)."""
    u, s, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    if kind == "decaying":
        s = torch.logspace(0, -6, 32, dtype=torch.float64)
    if kind == "rank 8":
        s = (torch.arange(32) < 8).double()
    x = ((u * s) @ vt)[None]
    exact = torch.from_numpy(orthogonal(x[0].numpy(), 5))
    for precision, limit in (("fp32", 5e-5), ("bf16", 0.5)):
        found = orthogonalise(x.float(), 5, precision)[0]
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < limit


def test_singular_values_end_near_one():
    found = orthogonalise(torch.randn(1, 64, 128), 5, "fp32")[0]
    values = torch.linalg.svdvals(found)
    assert 0.65 < values.min() < values.max() < 1.25


def test_torchs_muon_is_ours_but_for_its_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: t.clone())
    for ours, theirs in (("original", "original"), ("match_rms", "match_rms_adamw")):
        assert_alike(
            lambda p, o=ours: Muon(p, lr=1.0, weight_decay=0.1, adjust_lr=o),
            lambda p, t=theirs: torch.optim.Muon(p, lr=1.0, weight_decay=0.1, adjust_lr_fn=t),
            without=("vector", "conv"),
        )


def test_timms_muon_is_ours_with_the_published_coefficients(monkeypatch):
    exact = functools.partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float64)
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", exact)
    for ours, theirs in (("original", "original"), ("match_rms", "match_rms_adamw")):
        assert_alike(
            lambda p, o=ours: Muon(p, lr=1.0, weight_decay=0.1, adjust_lr=o),
            lambda p, t=theirs: timm.optim.Muon(
                p, lr=1.0, weight_decay=0.1, nesterov=True, adjust_lr_fn=t,
                ns_coefficients=COEFFICIENTS,
            ),
            without=WITHOUT,
        )  # fmt: skip


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, 8),
        nn.Linear(8, 4),
    ).to(dtype, memory_format=torch.channels_last)


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)


REST = {
    "adamw": AdamW(name="adamw", lr=0.02, weight_decay=0.3),
    "sgd": SGD(name="sgd", lr=0.05, momentum=0.7, nesterov=True),
    "lamb": LambConfig(name="lamb", lr=0.03, betas=(0.8, 0.95), weight_decay=0.2),
}


@pytest.mark.parametrize("rest", REST)
def test_the_rest_steps_as_its_optimizer_alone(rest):
    model = make_model()
    alone = copy.deepcopy(model)
    optimizer = build_optimizer(model, MuonConfig(name="muon", lr=0.1, rest=REST[rest]))
    other = build_optimizer(alone, REST[rest])
    for step in range(3):
        for network, found in ((model, optimizer), (alone, other)):
            give_gradients(network, step)
            set_lr(found, 1 / (1 + step))
            found.step()
    weights, expected = (dict(m.named_parameters()) for m in (model, alone))
    same = {name for name, p in weights.items() if torch.equal(p, expected[name])}
    assert same == weights.keys() - {"0.weight", "3.weight"}
    if rest == "lamb":
        assert set(trust_ratios(optimizer, model)) == {"4.weight"}


def test_each_weight_has_the_decay_and_the_rate_that_the_recipe_says():
    config = MuonConfig(
        name="muon",
        lr=0.1,
        weight_decay=0.01,
        weight_decay_of={"3": 0.5},
        rest=AdamW(name="adamw", lr=0.02, weight_decay=0.3),
    )
    model = make_model()
    optimizer = build_optimizer(model, config)
    said = {p: (g["weight_decay"], g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    assert {name: said[p] for name, p in model.named_parameters()} == {
        "0.weight": (0.01, 0.1),
        "1.weight": (0.0, 0.02),
        "1.bias": (0.0, 0.02),
        "3.weight": (0.5, 0.1),
        "3.bias": (0.0, 0.02),
        "4.weight": (0.3, 0.02),
        "4.bias": (0.0, 0.02),
    }


def test_layer_decay_lowers_both_rates():
    model = timm.create_model("test_vit")
    config = MuonConfig(name="muon", lr=0.1, layer_decay=0.5, rest=AdamW(name="adamw", lr=0.02))
    optimizer = build_optimizer(model, config)
    rates = {p: g["base_lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[model.head.weight] == 0.02
    block = model.blocks[-1]
    assert rates[block.mlp.fc1.weight] / rates[block.mlp.fc1.bias] == pytest.approx(5)
    assert rates[block.mlp.fc1.weight] < 0.1


def test_momentum_of_a_schedule_is_muons_alone():
    model = make_model()
    optimizer = build_optimizer(model, MuonConfig(name="muon", lr=0.1, rest=REST["sgd"]))
    set_momentum(optimizer, 0.5)
    momenta = {g["momentum"] for g in optimizer.param_groups if g["use_muon"]}
    assert momenta == {0.5}
    assert {g["momentum"] for g in optimizer.param_groups if not g["use_muon"]} == {0.7}


@pytest.mark.parametrize("rest", REST)
def test_a_copy_and_loaded_state_step_on_as_the_original(rest):
    model = make_model()
    optimizer = build_optimizer(model, MuonConfig(name="muon", lr=0.1, rest=REST[rest]))
    give_gradients(model, 0)
    optimizer.step()
    twin, of_twin = copy.deepcopy((model, optimizer))
    loaded = copy.deepcopy(model)
    of_loaded = build_optimizer(loaded, MuonConfig(name="muon", lr=0.1, rest=REST[rest]))
    of_loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as Accelerate does
    for network, found in ((model, optimizer), (twin, of_twin), (loaded, of_loaded)):
        give_gradients(network, 1)
        found.step()
    for a, b, c in zip(*(m.parameters() for m in (model, twin, loaded)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_nothing_is_read_back_from_a_device():
    """On the meta device, where a read-back raises, with the rate as a tensor."""
    with torch.device("meta"):
        model = make_model()
        optimizer = build_optimizer(
            model, MuonConfig(name="muon", lr=0.1, weight_decay=0.1, rest=REST["sgd"])
        )
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.param_groups = [g for g in optimizer.param_groups if g["use_muon"]]
        optimizer.rest = None
        optimizer.step()


def test_half_precision_weights_are_rounded_once():
    model = make_model(torch.bfloat16)
    weight = model[3].weight
    optimizer = build_optimizer(
        model, MuonConfig(name="muon", lr=0.1, weight_decay=0.1, nesterov=False)
    )
    before = weight.detach().double()
    give_gradients(model, 0)
    u = 0.05 * weight.grad.double()
    optimizer.step()
    made = torch.from_numpy(orthogonal(u.numpy(), 5))
    expected = before * (1 - 0.01) - 0.1 * adjusted(weight.shape, "original") * made
    assert optimizer.state[weight]["momentum_buffer"].dtype == torch.float32
    torch.testing.assert_close(weight.detach().double(), expected, rtol=4e-3, atol=1e-7)


def test_without_a_matrix_it_is_refused():
    with pytest.raises(UserError, match=r"no linear layer or convolution .* but its classifier"):
        build_optimizer(nn.Sequential(nn.Linear(3, 2)), MuonConfig(name="muon", lr=1))


ADAPTER = TypeAdapter(Optimizer)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rest": {"name": "lars", "lr": 1}}, "lars"),
        ({"rest": {"name": "sgd", "lr": 1, "layer_decay": 0.5}}, "rest.layer_decay: say it once"),
        ({"momentum": 0}, "nesterov: true with momentum 0"),
        ({"adamw_lr": 1, "rest": {"name": "sgd", "lr": 1}}, "remove adamw_lr"),
        ({"ns_steps": 0}, "ns_steps"),
    ],
)
def test_contradictions_are_refused(keys, says):
    with pytest.raises(ValidationError, match=says):
        ADAPTER.validate_python({"name": "muon", "lr": 1, **keys})


def test_keys_of_0_1_mean_what_they_meant():
    old = {"name": "muon", "lr": 1, "weight_decay": 0.1, "adamw_lr": 2, "match_adamw": True}
    rest = AdamW(name="adamw", lr=2, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    new = MuonConfig(name="muon", lr=1, weight_decay=0.1, adjust_lr="match_rms", rest=rest)
    assert ADAPTER.validate_python(old) == new
    assert ADAPTER.validate_python(new.model_dump(mode="json")) == new


def test_clipping_and_max_norm_hold_beside_it():
    model = make_model()
    optimizer = build_optimizer(model, MuonConfig(name="muon", lr=0.5, rest=REST["sgd"]))
    keep_within(optimizer, model, 0.3)
    give_gradients(model, 0)
    for clip in (ClipNorm(name="norm", limit=0.1), ClipAdaptive(name="adaptive")):
        grads = [p.grad for p in model.parameters()]
        clip_gradients(clip, model, nn.utils.get_total_norm(grads))
    assert float(nn.utils.get_total_norm(grads)) <= 0.1 + 1e-6
    optimizer.step()
    for name in ("0.weight", "3.weight", "4.weight"):
        assert model.get_parameter(name).flatten(1).norm(dim=1).max() <= 0.3 + 1e-6
