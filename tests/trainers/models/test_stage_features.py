"""Features of several stages before the classifier, against hooks on the stages."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.model import Model
from bigbatch.trainers.models.build import build_model

CASES = {
    "test_resnet": (["layer3", "layer1"], 32),
    "test_convnext": (["stages.1", "stages.2"], 32),
    "test_efficientnet": (["blocks.0"], 32),
    "test_vit": (["blocks.2"], 160),
}


def built(name: str, stages: list[str], size: int, **more: Any) -> nn.Module:
    config = Model.model_validate({"name": name, "joined_stages": stages, **more})
    return build_model(config, classes=4, channels=3, seed=0, image_size=size)


@pytest.mark.parametrize("name", CASES)
def test_the_classifier_takes_means_of_maps_and_the_models_own_features(name: str) -> None:
    stages, size = CASES[name]
    model = built(name, stages, size).eval()
    plain = timm.create_model(name, num_classes=4).eval()
    state = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    weights = {k: v for k, v in state.items() if v.shape == plain.state_dict()[k].shape}
    assert len(plain.state_dict()) - len(weights) == 1  # the classifier's matrix
    plain.load_state_dict(weights, strict=False)
    maps: dict[str, Tensor] = {}
    for stage in stages:
        plain.get_submodule(stage).register_forward_hook(
            lambda module, inputs, output, stage=stage: maps.update({stage: output})
        )
    seen: list[Tensor] = []
    plain.get_classifier().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        plain(x)
        order = sorted(stages)
        if name == "test_vit":  # tokens [B, 1 + places, C], of which the first is no place
            means = [maps[stage][:, plain.num_prefix_tokens :].mean(1) for stage in order]
        else:
            means = [maps[stage].mean((2, 3)) for stage in order]
        features = torch.cat([*means, seen[0]], 1)
        head: Any = model.get_classifier()  # type: ignore[operator]
        torch.testing.assert_close(model(x), head(features))
        assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_a_head_and_a_norm_of_the_features_go_with_it() -> None:
    model = built("test_resnet", ["layer2"], 32, head={"name": "linear", "feature_norm": "layer"})
    head: Any = model.get_classifier()  # type: ignore[operator]
    assert head.norm.normalized_shape == (96 + 48,)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_weights_of_the_plain_network_fit() -> None:
    given = timm.create_model("test_resnet", num_classes=4).state_dict()
    found = built("test_resnet", ["layer2"], 32).state_dict()
    assert given.keys() == found.keys()
    other = {name for name in given if given[name].shape != found[name].shape}
    assert other == {"fc.weight"}


def test_stages_that_are_not_there_are_named() -> None:
    with pytest.raises(UserError, match=r"no stage 'layer5'; did you mean layer\d\? its stages"):
        built("test_resnet", ["layer5"], 32)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["model={name: lenet5, joined_stages: [x]}"], "forward_intermediates, which lenet5 has n"),
        (["model.joined_stages=[layer1, layer1]"], "names a stage twice"),
        (["model.joined_stages=[layer1]", "model.recompute=true"], "model.recompute is not done"),
    ],
)
def test_what_cannot_be_is_refused(keys: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("digits", keys)
