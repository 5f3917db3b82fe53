"""Which parameters decay and adapt, for models of different families."""

import importlib

import pytest
import timm
import timm.optim
import torch
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.trainers.optim.groups import (
    TIMM_NORMS,
    decay_by_layer,
    hidden_matrices,
    is_bias,
    is_norm,
    named_parameters,
    parameter_groups,
)


def plain_names(model):
    return {name for name, _, plain in named_parameters(model) if plain}


def create(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


def test_by_module_type_not_by_name_or_dimension():
    """`'bn' in name` misses a BatchNorm called downsample.1, and takes a Linear called subnet;
    flattened shards have one dimension, whatever they hold."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
            self.subnet = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))
            self.bias_table = nn.Embedding(3, 4)

    assert plain_names(Odd()) == {"downsample.1.weight", "downsample.1.bias", "subnet.bias"}


def test_resnet50_has_53_batchnorms_and_one_bias():
    model = create("resnet50")
    plain = plain_names(model)
    assert len(plain) == 2 * 53 + 1
    assert {"layer1.0.downsample.1.weight", "bn1.bias", "fc.bias"} <= plain
    assert sum(1 for _ in named_parameters(model)) == 161


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "convnextv2_atto", "beit_base_patch16_224", "mixer_s32_224"]
)
def test_norm_layers_of_other_families(name):
    model = create(name)
    plain = plain_names(model)
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            assert {f"{path}.{n}" for n, _ in module.named_parameters(recurse=False)} <= plain
    weights = {n for n, _ in model.named_parameters()} - plain
    assert weights
    assert not any(n.endswith(".bias") for n in weights)


def test_what_the_model_itself_excludes():
    plain = plain_names(create("vit_tiny_patch16_224"))
    assert {"pos_embed", "cls_token"} <= plain


def test_biases_by_attribute():
    yes = ["bias", "q_bias", "in_proj_bias", "bias_ih_l0", "bias_k"]
    no = ["weight", "relative_position_bias_table", "biased", "unbias"]
    assert all(map(is_bias, yes))
    assert not any(map(is_bias, no))


def test_timms_own_norms_count():
    found = {
        kind.__name__: kind
        for name in sorted(TIMM_NORMS)  # each of them is there in the timm that is installed
        for kind in vars(importlib.import_module(name)).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == name
    }
    assert {"RmsNorm", "GlobalResponseNorm", "LayerScale", "EvoNorm2dS0"} <= found.keys()
    for kind in found.values():
        assert is_norm(kind.__new__(kind))
        own = type("Own", (kind,), {})
        assert is_norm(own.__new__(own))
    assert not is_norm(timm.layers.Mlp(8))


def test_shared_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    names = [name for name, _, _ in named_parameters(model)]
    assert names == ["0.weight", "0.bias", "1.bias", "2.bias"]
    groups = parameter_groups(model, 0.1)
    assert [(len(g["params"]), g["weight_decay"], g["adapt"]) for g in groups] == [
        (1, 0.1, True),
        (3, 0.0, False),
    ]


def test_layer_decay_follows_timms_layers():
    model = create("vit_tiny_patch16_224")
    groups = parameter_groups(model, 0.05, 0.5)
    scale = {p: g["lr_scale"] for g in groups for p in g["params"]}
    peer = {
        p: group["lr_scale"]
        for group in timm.optim.param_groups_layer_decay(model, 0.05, layer_decay=0.5)
        for p in group["params"]
    }
    assert scale == peer
    assert scale[model.head.weight] == 1.0
    assert scale[model.pos_embed] == 0.5**13
    decays = {p: g["weight_decay"] for g in groups for p in g["params"]}
    assert decays[model.blocks[0].attn.qkv.weight] == 0.05
    assert decays[model.blocks[0].norm1.weight] == 0.0


def test_layer_decay_of_an_unordered_model_is_one_clear_error():
    with pytest.raises(UserError, match="group_matcher"):
        parameter_groups(nn.Linear(2, 2), 0.0, 0.9)


def test_muon_takes_hidden_matrices_only():
    vit = create("vit_tiny_patch16_224")
    hidden = hidden_matrices(vit)
    assert {vit.blocks[3].mlp.fc1.weight, vit.blocks[0].attn.qkv.weight} < hidden
    assert (
        not {vit.head.weight, vit.pos_embed, vit.norm.weight, vit.patch_embed.proj.weight} & hidden
    )
    resnet = create("resnet18")
    for parameter in resnet.layer1.parameters():
        parameter.requires_grad = False
    matrices = {name for name, p in resnet.named_parameters() if p in hidden_matrices(resnet)}
    assert {"conv1.weight", "layer4.1.conv2.weight", "layer2.0.downsample.0.weight"} < matrices
    assert not [name for name in matrices if "layer1" in name or "fc" in name or "bn" in name]


def decays_of(model, decays):
    found = decay_by_layer(model, decays)
    return {name: found[p] for name, p in model.named_parameters() if p in found}


def test_decay_by_layer_goes_by_whole_names_and_types():
    model = create("resnet18", num_classes=5)
    everything = {name for name, _, plain in named_parameters(model) if not plain}
    layer4 = {name: 0.5 for name in everything if name.startswith("layer4.")}
    assert decays_of(model, {"layer4": 0.5}) == layer4
    assert decays_of(model, {"fc": 0.0}) == {"fc.weight": 0.0}
    firsts = {f"layer{i}.0.conv1.weight": 0.1 for i in range(1, 5)}
    assert decays_of(model, {"*.0.conv1": 0.1}) == firsts
    both = decays_of(model, {"type:Conv2d": 0.2, "layer1.0": 0.3})
    assert both.keys() == everything - {"fc.weight"}
    assert {name for name, decay in both.items() if decay == 0.3} == {
        f"layer1.0.conv{i}.weight" for i in (1, 2)
    }
    groups = parameter_groups(model, 0.1, decays=decay_by_layer(model, {"fc": 0.0}))
    assert [g["weight_decay"] for g in groups] == [0.0, 0.1, 0.0]
    assert [len(g["params"]) for g in groups] == [1, len(everything) - 1, 41]
    assert [g["adapt"] for g in groups] == [True, True, False]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("layer", r"'layer' names no layer with weights of ResNet; layers are called layer\d"),
        ("ayer4", "'ayer4' names no layer"),
        ("conv1.weight", "names no layer"),
        ("*.*.bn1", "nothing that decays in ResNet: norms and biases never do"),
        ("type:Conv3d", "names no layer"),
        ("relu", "names no layer with weights"),
    ],
)
def test_a_name_that_fits_nothing_is_an_error(pattern, says):
    with pytest.raises(UserError, match=says):
        decay_by_layer(create("resnet18"), {pattern: 0.1})
