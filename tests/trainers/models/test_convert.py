"""Parts changed in whole models: by type, weights kept, or one message."""

from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.model import Model
from bigbatch.trainers.models import norm_layers as layers
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.models.convert import check_output, check_sizes, convert
from bigbatch.trainers.optim.groups import named_parameters

GROUP = {"name": "group", "groups": 8}


def built(name: str = "test_resnet", size: int = 32, **keys: Any) -> nn.Module:
    config = Model.model_validate({"name": name, **keys})
    return build_model(config, classes=5, channels=3, seed=0, image_size=size)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "torchvision:resnet18"])
def test_every_batch_norm_is_swapped_and_keeps_its_weights(name: str) -> None:
    """downsample.1 too, whose name says nothing; timm's fused activation goes on."""
    plain, swapped = built(name), built(name, norm=GROUP)
    norms = {n: m for n, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms
    for path, old in norms.items():
        new: Any = swapped.get_submodule(path)
        assert isinstance(new, layers.Group)
        assert torch.equal(new.weight, old.weight)
        assert type(new.act) is (type(old.act) if isinstance(old, BatchNormAct2d) else nn.Identity)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in swapped.modules())
    names = {n for n, _, is_plain in named_parameters(swapped) if is_plain}
    assert names >= {f"{path}.weight" for path in norms}  # neither decayed nor adapted
    assert {n for n, _ in swapped.named_parameters()} == {n for n, _ in plain.named_parameters()}


def test_thresholds_take_the_place_of_each_relu_behind_a_norm() -> None:
    model = built(norm={"name": "filter_response"})
    found = {n: m for n, m in model.named_modules() if isinstance(m, layers.FilterResponse)}
    blocks = [n for n, m in model.named_modules() if hasattr(m, "act3") or hasattr(m, "act2")]
    assert blocks
    for path in blocks:
        block: Any = model.get_submodule(path)
        last = "bn3" if hasattr(block, "bn3") else "bn2"
        assert isinstance(block.act1, nn.Identity)
        assert found[f"{path}.bn1"].tau is not None
        assert found[f"{path}.{last}"].tau is None  # an addition follows, and then a ReLU
        assert isinstance(getattr(block, last.replace("bn", "act")), nn.ReLU)
    frozen = {n for n, _, plain in named_parameters(model) if plain}
    assert "bn1.tau" in frozen
    fused = built("test_efficientnet", norm={"name": "filter_response"})
    assert all(type(m) is not BatchNormAct2d for m in fused.modules())
    with pytest.raises(UserError, match=r"layer1\.0\.relu of torchvision:resnet18 follows a Batch"):
        built("torchvision:resnet18", norm={"name": "filter_response"})


def test_threshold_is_learned_from_both_sides() -> None:
    layer = layers.FilterResponse(2, apply_act=True, eps=1e-6)
    with torch.no_grad():
        layer.tau.copy_(torch.tensor([-0.5, 0.5]))
    x = torch.randn(3, 2, 4, 4)
    y = x / (x.square().mean((2, 3), keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(layer(x), torch.maximum(y, layer.tau.view(-1, 1, 1)))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "test_vit", "norm": GROUP}, "test_vit has no BatchNorm to put group in place of"),
        (
            {"norm": {"name": "group", "groups": 7}},
            r"groups = 7 does not divide the 16 channels of conv1.1; choose a divisor, such as 1",
        ),
        (
            {"name": "levit_128s", "size": 224, "norm": GROUP},
            r"of levit_128s is BatchNorm1d\(.*leave model.norm out",
        ),
        (
            {"name": "nin", "head": {"name": "cosine"}},
            "one linear layer's; the classifier of this one is Conv2d",
        ),
        (
            {"name": "test_efficientnet", "size": 4, "norm": {"name": "instance"}},
            r"cannot take images of \[3, 4, 4\] \(ValueError: Expected more than 1 spatial",
        ),
        (
            {"name": "tf_efficientnet_b0", "weight_standardization": True},
            r"changes torch's Conv2d, and conv_stem of .* is another one",
        ),
    ],
)
def test_what_a_model_has_no_place_for(keys: dict[str, Any], said: str) -> None:
    with torch.device("cpu"), pytest.raises(UserError, match=said):
        built(**keys)


def test_standardised_convolutions_are_all_but_the_classifier() -> None:
    model = built("nin", weight_standardization=True)
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert kinds == [layers.StandardizedConv2d] * 8 + [nn.Conv2d]


def test_an_example_changes_nothing() -> None:
    """Neither statistics, nor modes, nor the stream of random numbers."""
    model = built()
    model.train()
    model.layer1.eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    stream = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    check_output(model, torch.randn(2, 3, 32, 32, generator=torch.Generator()), 5, "test_resnet")
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_size_is_asked_for_where_it_matters() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    norm = {"name": "filter_response"}
    with pytest.raises(UserError, match="needs the images' size"):
        convert(model, Model.model_validate({"name": "own:net", "norm": norm}), None)


def test_a_model_of_one_size_takes_no_other() -> None:
    """timm's transformers, unless they are told to; convolutions with a mean take any."""
    sizes = [("evaluate.image_size", 48)]
    options = {"img_size": 32, "patch_size": 8, "dynamic_img_size": False}
    vit = built("test_vit", options=options)
    check_sizes(built(), 3, 32, sizes, "test_resnet")
    check_sizes(vit, 3, 32, [("evaluate.image_size", 32)], "test_vit")
    with pytest.raises(
        UserError,
        match=r"^evaluate.image_size = 48: model test_vit takes images of 32 alone \(.*48.*32.*\); "
        "leave evaluate.image_size out, or .*dynamic_img_size=true",
    ):
        check_sizes(vit, 3, 32, sizes, "test_vit")
    with torch.device("meta"):
        there = built("test_vit", options=options)
    with pytest.raises(UserError, match="takes images of 32 alone"):
        check_sizes(there, 3, 32, sizes, "test_vit")
    any_size = built("test_vit", options=options | {"dynamic_img_size": True})
    check_sizes(any_size, 3, 32, sizes, "test_vit")
    with pytest.raises(UserError, match="model lenet5 takes images of 32 alone"):
        check_sizes(built("lenet5"), 3, 32, sizes, "lenet5")
