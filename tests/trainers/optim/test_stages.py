"""What learns of a network, when, and at which rate."""

import copy
import math
from collections import Counter

import pytest
import timm
import torch
from pydantic import TypeAdapter
from torch import nn

from bigbatch.configs import optimizers
from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.model import Model
from bigbatch.configs.transfer import Transfer
from bigbatch.trainers.models.batch_stats import (
    StepStatistics,
    averaged_layers,
    recompute_statistics,
)
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.optim import build_optimizer, set_lr
from bigbatch.trainers.optim.stages import (
    NEVER,
    Learning,
    Waiting,
    fit_transfer,
    freeze,
    keep_statistics,
    learning_of,
    module_starts,
    rate_table,
    stages_of,
)
from tests.trainers.optim.test_build import ALL, make_config

NETS = {
    "test_resnet": ["stem", "layer1", "layer2", "layer3", "layer4", "head"],
    "test_vit": ["stem", *(f"blocks.{i}" for i in range(6)), "head"],
    "convnext_atto": ["stem", *(f"stages.{i}" for i in range(4)), "head"],
    "efficientnet_b0": ["stem", *(f"blocks.{i}" for i in range(7)), "head"],
    "swin_tiny_patch4_window7_224": ["stem", *(f"layers.{i}" for i in range(4)), "head"],
    "torchvision:resnet18": ["stem", "layer1", "layer2", "layer3", "layer4", "head"],
    "torchvision:densenet121": [
        *("stem", "features.denseblock1", "features.transition1", "features.denseblock2"),
        *("features.transition2", "features.denseblock3", "features.transition3"),
        *("features.denseblock4", "head"),
    ],
    "torchvision:vit_b_16": [
        *("stem", *(f"encoder.layers.encoder_layer_{i}" for i in range(12)), "head")
    ],
    "lenet5": ["stem", "3", "7", "9", "head"],
}


def net(name: str, size: int = 32) -> nn.Module:
    with torch.device("meta"):
        config = Model.model_validate({"name": name})
        return build_model(config, classes=10, channels=3, seed=0, image_size=size)


def small() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5, drop_rate=0.5, drop_path_rate=0.5)


def parse(**keys: object) -> Transfer:
    found: Transfer = TypeAdapter(Transfer).validate_python(keys)
    return found


@pytest.mark.parametrize("name", NETS)
def test_stages_from_the_lowest_to_the_head(name: str) -> None:
    sizes = {"test_vit": 160, "lenet5": 32, "test_resnet": 32}
    model = net(name, sizes.get(name, 224))
    stages = stages_of(model)
    assert [stage.name for stage in stages] == NETS[name]
    counted = Counter(p for stage in stages for p in stage.parameters)
    assert counted == Counter(dict(model.named_parameters()).keys())  # each in one of them
    assert len(stages[-1].parameters) == 2  # the classifier, and nothing of what is below it


def test_a_norm_before_the_classifier_belongs_to_the_last_blocks() -> None:
    last = stages_of(net("convnext_atto", 224))[-2]
    assert {"head.norm.weight", "stages.3.blocks.0.norm.weight"} < set(last.parameters)


def test_no_stages_without_a_classifier() -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(UserError, match="ResNet names no classifier"):
        stages_of(model)


def frozen_names(config: Transfer, model: nn.Module) -> set[str]:
    return learning_of(config, model, lambda k: 0, 1).frozen(0)


def test_the_head_alone() -> None:
    model = small()
    everything = set(dict(model.named_parameters()))
    assert everything - frozen_names(parse(name="head"), model) == {"fc.weight", "fc.bias"}


def test_frozen_stages_and_layers() -> None:
    model = small()
    names = list(dict(model.named_parameters()))
    found = frozen_names(parse(name="frozen", stages=2), model)
    assert found == {n for n in names if n.startswith(("conv1.", "bn1.", "layer1."))}
    by_name = parse(name="frozen", layers=["stem", "layer1", "layer3.*.bn1", "type:Linear"])
    expected = {n for n in names if n.startswith("layer3.") and ".bn1." in n}
    assert frozen_names(by_name, model) == found | expected | {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"name": "frozen", "stages": 6},
            "stages = 6: there are 6 stages, stem, layer1.* at most 5",
        ),
        ({"name": "frozen", "layers": ["layer"]}, "'layer' names no stage and no layer .* layer"),
        ({"name": "frozen", "stages": 5, "layers": ["head"]}, "freezes all of ResNet"),
        ({"name": "gradual", "every": "1 steps", "stages": 6}, "there are 6 stages"),
        ({"name": "all", "rates": {"heads": 0.1}}, "transfer.rates: 'heads' names no .* head"),
    ],
)
def test_what_is_not_there_is_refused(keys: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        learning_of(parse(**keys), small(), lambda k: k, 100)


def test_a_stage_that_would_begin_after_the_run_is_refused() -> None:
    config = parse(name="gradual", every="2 steps")
    assert learning_of(config, small(), lambda k: 2 * k, 11).starts["conv1.0.weight"] == 10
    with pytest.raises(UserError, match=r"2 steps: layer1, stem would begin .* 8 steps.*stages=2"):
        learning_of(config, small(), lambda k: 2 * k, 8)


def test_a_stage_more_from_the_top_in_each_period() -> None:
    """In samples: 3 epochs of 100 are 300, which 32 at a time are passed after step 10."""
    weights = "model.checkpoint=w.safetensors"
    keys = ["global_batch=32", "micro_batch=32", "duration=60 steps", weights]
    recipe = load_recipe("digits", [*keys, "transfer={name: gradual, every: 3 epochs, stages: 1}"])
    learning = fit_transfer(recipe, small(), epoch_samples=100)
    firsts = {s.name: {learning.starts.get(n, 0) for n in s.parameters} for s in learning.stages}
    assert firsts == {
        "head": {0.0},
        "layer4": {10.0},
        "layer3": {19.0},
        "layer2": {29.0},
        "layer1": {38.0},
        "stem": {NEVER},
    }
    assert [s for step in range(60) for s in learning.begun(step)] == [
        *("layer4", "layer3", "layer2", "layer1")
    ]


def test_a_decay_of_what_is_frozen_is_refused() -> None:
    model = small()
    freeze(model, learning_of(parse(name="frozen", stages=2), model, lambda k: 0, 1))
    config = optimizers.SGD(name="sgd", lr=0.1, weight_decay_of={"layer1": 0.1})
    with pytest.raises(UserError, match="'layer1' names what is frozen in ResNet, which does not"):
        build_optimizer(model, config)


FREEZE_HEAD = "transfer={name: frozen, layers: [head]}"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ([FREEZE_HEAD, "loss={name: center}"], "loss center works on the classifier while it tra"),
        ([FREEZE_HEAD, "regularise.input_noise=0.1"], "regularise.input_noise works on the class"),
        ([FREEZE_HEAD, "regularise.drop_connect=0.1"], "transfer.layers freezes it; leave one of"),
        (
            ["transfer={name: head}", "distill={teacher: a, hint: {layer: layer3}}"],
            "distill.hint.layer = layer3 is frozen at first",
        ),
    ],
)
def test_what_works_on_a_layer_in_training_needs_one_that_learns(
    keys: list[str], says: str
) -> None:
    weights = "model.checkpoint=w.safetensors"
    recipe = load_recipe("digits", [weights, "augment.mixup=0", *keys])
    with pytest.raises(UserError, match=says):
        fit_transfer(recipe, small(), 100)
    others = [key for key in keys if not key.startswith("transfer")]
    lower = "transfer={name: frozen, stages: 2}"
    fit_transfer(load_recipe("digits", [weights, "augment.mixup=0", lower, *others]), small(), 100)


def test_rates_by_stage_and_layer() -> None:
    config = parse(name="all", stage_decay=0.5, rates={"layer2": 0.1, "type:BatchNorm2d": 2.0})
    factors = learning_of(config, small(), lambda k: 0, 1).factors
    assert factors["layer4.0.conv1.weight"] == 0.5
    assert factors["layer2.0.conv1.weight"] == 0.5**3 * 0.1
    assert factors["layer2.0.bn1.weight"] == 0.5**3 * 2  # the last one that fits
    assert factors["conv1.0.weight"] == 0.5**5
    assert "fc.weight" not in factors


def test_the_table_says_which_rate_each_stage_has() -> None:
    model = small()
    config = parse(name="gradual", every="2 steps", stages=1, stage_decay=0.5)
    learning = learning_of(config, model, lambda k: 2 * k, 100)
    freeze(model, learning)
    optimizer = build_optimizer(
        model, optimizers.SGD(name="sgd", lr=0.1, weight_decay=0.01), learning
    )
    rows = rate_table(model, learning, optimizer, 2.0)
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    lowest = rows[0]
    assert (lowest["stage"], lowest["tensors"], lowest["lr"]) == ("stem", 9, None)
    layer4 = {row["weight_decay"]: row for row in rows if row["stage"] == "layer4"}
    assert layer4.keys() == {0.0, 0.01}
    assert all(row["lr"] == 0.1 and row["start"] == 2 for row in layer4.values())
    assert rows[-1]["lr"] == 0.2
    assert rows[-1]["start"] == 0


def test_what_never_learns_stays_in_evaluation() -> None:
    """Statistics, dropout and stochastic depth; whatever train() says, in copies too."""
    model = small()
    freeze(model, learning_of(parse(name="frozen", stages=4), model, lambda k: 0, 1))
    twin = copy.deepcopy(model)
    for network in (model, twin):
        before = {n: b.clone() for n, b in network.named_buffers()}
        network.eval()
        network.train()
        statistics = StepStatistics(network)
        assert {name.partition(".")[0] for name in statistics.names} == {"layer4"}
        statistics.begin()
        network(torch.randn(8, 3, 32, 32))
        statistics.add()
        statistics.finish(statistics.local(), 1)
        changed = {n for n, b in network.named_buffers() if not torch.equal(b, before[n])}
        assert changed
        assert {name.partition(".")[0] for name in changed} == {"layer4"}
        training = {n for n, m in network.named_modules() if m.training}
        assert "layer4.0.drop_path" in training
        assert "layer3.0.drop_path" not in training
    assert twin.layer1.train.__self__ is twin.layer1
    assert {n.partition(".")[0] for n, _ in averaged_layers(model)} == {"layer4"}


@pytest.mark.parametrize("member", [False, True])
def test_statistics_that_are_made_anew_leave_frozen_ones_alone(member: bool) -> None:
    """Of averages and soups: in the run, and of members that are built to be used."""
    model = small()
    config = parse(name="frozen", stages=4)
    if member:
        keep_statistics(model.eval(), config)
        assert all(p.requires_grad for p in model.parameters())
    else:
        freeze(model, learning_of(config, model, lambda k: 0, 1))
    before = {n: b.clone() for n, b in model.named_buffers()}
    recompute_statistics(model, [torch.randn(8, 3, 32, 32)], 1, lambda total: total)
    changed = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert {name.partition(".")[0] for name in changed} == {"layer4"}


def test_modules_without_parameters_go_by_what_is_around_them() -> None:
    model = small()
    config = parse(name="gradual", every="1 steps")
    starts = module_starts(model, learning_of(config, model, lambda k: k, 100))
    assert starts[model.get_submodule("layer3.0.drop_path")] == 2
    assert starts[model.get_submodule("layer4.0.act1")] == 1
    assert model not in starts
    assert model.get_submodule("global_pool") not in starts


def gradients(model: nn.Module, step: int) -> None:
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("optimizer_name", [name for name in ALL if name != "lbfgs"])
def test_what_waits_is_untouched_and_begins_as_at_a_first_step(optimizer_name: str) -> None:
    """Against an optimizer that is made only when the wait is over, bit for bit."""
    decay = {} if optimizer_name == "sm3" else {"weight_decay": 0.01}
    config = make_config(optimizer_name, **decay)
    model, later = small(), small()
    names = {n for n, _ in model.named_parameters() if n.startswith(("layer3.", "bn1."))}
    optimizer = build_optimizer(model, config, Learning(starts=dict.fromkeys(names, 3.0)))
    waiting = Waiting(optimizer)
    initial = {n: p.detach().clone() for n, p in model.named_parameters()}
    made_at_once = {  # Adagrad's accumulators, of which no step has been taken
        n: {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}
        for n, p in model.named_parameters()
    }
    for name, parameter in later.named_parameters():
        parameter.requires_grad_(name in names)
    reference = build_optimizer(later, config)
    for step in range(5):
        waiting.step = step
        set_lr(optimizer, 1.0)
        gradients(model, step)
        optimizer.step()
        if step >= 3:
            gradients(later, step)
            reference.step()
        for name, parameter in model.named_parameters():
            if name not in names:
                assert not torch.equal(parameter, initial[name]), name
            elif step < 3:
                assert torch.equal(parameter, initial[name]), (name, step)
                state = optimizer.state.get(parameter, {})
                assert state.keys() == made_at_once[name].keys()
                assert all(torch.equal(state[k], v) for k, v in made_at_once[name].items())
    there = dict(later.named_parameters())
    for name, parameter in model.named_parameters():
        if name in names:
            assert torch.equal(parameter, there[name]), name
    assert math.isfinite(sum(float(p.detach().sum()) for p in model.parameters()))
