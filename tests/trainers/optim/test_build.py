"""Every optimizer by name: built, stepped, checkpointed by parameter name, and logged."""

import json
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from bigbatch.configs.optimizers import Optimizer
from bigbatch.trainers.optim import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state_by_name,
    set_lr,
    trust_ratios,
)

ADAPTER: TypeAdapter[Any] = TypeAdapter(Optimizer)
ALL: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "lars": {"lr": 2.0, "nesterov": True},
    "lamb": {"lr": 0.03},
    "adam": {"lr": 0.01},
    "adamw": {"lr": 0.01},
    "adagrad": {"lr": 0.05},
    "adadelta": {"lr": 1.0},
    "rmsprop": {"lr": 0.003, "momentum": 0.9, "centered": True},
    "novograd": {"lr": 0.05},
    "adafactor": {"lr": 0.05},
    "sm3": {"lr": 0.1},
    "lion": {"lr": 0.003},
    "muon": {"lr": 0.02, "rest": {"name": "lamb", "lr": 0.01}},
    "lbfgs": {"lr": 0.5},
}


def make_config(name, **options):
    return ADAPTER.validate_python({"name": name, **ALL[name], **options})


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    return model.to(memory_format=torch.channels_last)


def train(model, optimizer, steps, start=0):
    """Fit fixed random images to their labels; the loss of each step."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(16, 3, 6, 6, generator=generator)
    labels = torch.arange(16) % 4
    losses = []
    for step in range(start, start + steps):
        set_lr(optimizer, 0.5 + 0.5 / (1 + step))

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            losses.append(optimizer.step(closure).item())
        else:
            losses.append(closure().item())
            optimizer.step()
    return losses


def test_every_name_in_the_schema_is_tested_here():
    schema = ADAPTER.json_schema()
    assert set(schema["discriminator"]["mapping"]) == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_each_optimizer_learns(name):
    model = make_model()
    losses = train(model, build_optimizer(model, make_config(name)), 40)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ALL)
def test_state_by_name_is_a_bit_exact_round_trip_through_files(name, tmp_path):
    model = make_model()
    optimizer = build_optimizer(model, make_config(name))
    train(model, optimizer, 5)
    tensors, scalars = optimizer_state_by_name(optimizer, model)
    safetensors.torch.save_file(tensors, tmp_path / "optimizer.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(scalars))

    resumed = make_model(seed=1)
    resumed.load_state_dict(model.state_dict())
    other = build_optimizer(resumed, make_config(name))
    load_optimizer_state(
        other,
        resumed,
        safetensors.torch.load_file(tmp_path / "optimizer.safetensors"),
        json.loads((tmp_path / "state.json").read_text()),
    )
    assert train(model, optimizer, 5, start=5) == train(resumed, other, 5, start=5)
    for (key, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    again, scalars_again = optimizer_state_by_name(other, resumed)
    wanted, scalars_wanted = optimizer_state_by_name(optimizer, model)
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[key], wanted[key]) for key in wanted)
    assert all(again[key].dtype == wanted[key].dtype for key in wanted)
    assert scalars_again == scalars_wanted


def test_state_has_the_standard_names():
    model = make_model()
    for name, states in {
        "sgd": {"momentum_buffer"},
        "lars": {"momentum_buffer"},
        "lamb": {"exp_avg", "exp_avg_sq", "step"},
        "adamw": {"exp_avg", "exp_avg_sq", "step"},
    }.items():
        optimizer = build_optimizer(model, make_config(name))
        train(model, optimizer, 1)
        tensors, scalars = optimizer_state_by_name(optimizer, model)
        parameters = dict(model.named_parameters())
        assert set(tensors) == {f"{state}/{key}" for state in states for key in parameters}
        assert scalars == {}


def test_float32_state_of_half_precision_weights_survives_loading():
    model = make_model().bfloat16()
    optimizer = build_optimizer(model, make_config("lars"))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    tensors, scalars = optimizer_state_by_name(optimizer, model)
    other = build_optimizer(model, make_config("lars"))
    load_optimizer_state(other, model, tensors, scalars)
    buffer = other.state[model[0].weight]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    assert torch.equal(buffer, optimizer.state[model[0].weight]["momentum_buffer"])
    assert buffer.stride() == model[0].weight.stride()


def test_loading_replaces_state_and_refuses_strangers():
    model = make_model()
    optimizer = build_optimizer(model, make_config("lars"))
    train(model, optimizer, 2)
    load_optimizer_state(optimizer, model, {}, {})
    assert not optimizer.state
    with pytest.raises(ValueError, match="belongs to no parameter"):
        load_optimizer_state(optimizer, model, {"momentum_buffer/9.weight": torch.zeros(1)}, {})


WITHOUT_DECAY = ("sm3", "adafactor", "muon", "lbfgs")  # none, or beside other motion


@pytest.mark.parametrize("name", [n for n in ALL if n not in WITHOUT_DECAY])
def test_norms_and_biases_never_decay(name):
    """With gradients of zero nothing but decay moves a weight."""
    model = make_model()
    optimizer = build_optimizer(model, make_config(name, weight_decay=0.1))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {"0.weight", "4.weight"}


def test_set_lr_scales_each_groups_own_rate():
    model = timm.create_model("test_vit")
    optimizer = build_optimizer(model, make_config("adamw", layer_decay=0.5))
    base = [group["base_lr"] for group in optimizer.param_groups]
    assert max(base) == 0.01
    assert len(set(base)) > 2
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25 * lr for lr in base]
    optimizer.param_groups[0]["lr"] = held = torch.tensor(0.0)
    set_lr(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(0.5 * base[0])


def test_trust_ratios_by_name():
    model = make_model()
    for name in ("lars", "lamb"):
        optimizer = build_optimizer(model, make_config(name))
        assert trust_ratios(optimizer, model) == {}
        train(model, optimizer, 1)
        ratios = trust_ratios(optimizer, model)
        assert set(ratios) == {"0.weight", "4.weight"}
        assert all(ratio > 0 for ratio in ratios.values())
    assert trust_ratios(build_optimizer(model, make_config("sgd")), model) == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "sgd", "lr": 0.1, "nesterov": True, "momentum": 0}, "momentum 0"),
        ({"name": "lamb", "lr": 0.1, "trust_bounds": [2, 1]}, "lower bound first"),
        ({"name": "sm3", "lr": 0.1, "weight_decay": 0.1}, "weight_decay"),
        ({"name": "lars", "lr": 0}, "greater than 0"),
    ],
)
def test_a_contradiction_in_the_recipe_is_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        ADAPTER.validate_python(options)
