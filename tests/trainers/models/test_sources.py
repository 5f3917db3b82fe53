"""Models of every source, by their names."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models as torchvision_models

from bigbatch.configs.errors import UserError
from bigbatch.configs.model import Model
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.models.sources import torchvision_names
from bigbatch.trainers.optim.groups import classifiers


def built(name: str, size: int = 32, channels: int = 3, classes: int = 7, **keys) -> nn.Module:
    return build_model(
        Model(name=name, **keys), classes=classes, channels=channels, seed=0, image_size=size
    )


def own_net(num_classes: int, in_chans: int, width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_chans, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


def not_a_net(num_classes: int, in_chans: int) -> int:
    return num_classes


def two_outputs(num_classes: int, in_chans: int) -> nn.Module:
    return own_net(num_classes + 1, in_chans)


HERE = f"{__name__}:own_net"


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [
        # LeCun et al. 1998, C1 156, C5 48,120, F6 10,164; C3 sees all maps: 2,416; output 850.
        ("lenet5", 32, 156 + 2416 + 48120 + 10164 + 850),
        ("nin", 32, None),
        ("zfnet", 224, None),
    ],
)
def test_teaching_nets_at_their_papers_sizes(name: str, size: int, parameters: int | None) -> None:
    channels = 1 if name == "lenet5" else 3
    with torch.device("meta"):
        model = built(name, size, channels, classes=10)
        assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_zfnet_has_the_maps_of_its_paper() -> None:
    """Zeiler and Fergus 2014, figure 3: 110, 55, 26, 13, 13, 13, 13, 6."""
    sizes, images = [], torch.zeros(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        for layer in built("zfnet", 224):
            images = layer(images)
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
                sizes.append(images.shape[2])
    assert sizes == [110, 55, 26, 13, 13, 13, 13, 6]


@pytest.mark.parametrize("name", ["lenet5", "zfnet", "nin"])
@pytest.mark.parametrize("size", [8, 17, 28, 65])
def test_teaching_nets_take_small_images(name: str, size: int) -> None:
    with torch.device("meta"):
        model = built(name, size, channels=1)
        assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)
        (head,) = classifiers(model)
    assert len(head.weight) == 7


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "regnet_y_400mf", "googlenet"])
def test_torchvision_s_models(name: str) -> None:
    """Also those that build nothing on the meta device by themselves, or have a second head."""
    with torch.device("meta"):
        model = built(f"torchvision:{name}", 64, channels=1)
        output = model.train()(torch.zeros(2, 1, 64, 64, device="meta"))
    assert output.shape == (2, 7)
    assert len(classifiers(model)[0].weight) == 7


def test_torchvision_s_network_is_its_own() -> None:
    ours = built("torchvision:mobilenet_v3_small")
    theirs = torchvision_models.mobilenet_v3_small(num_classes=7)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_pretrained_weights_of_torchvision_but_for_the_classifier(monkeypatch) -> None:
    given = torchvision_models.squeezenet1_1().state_dict()
    asked = {}

    def get_state_dict(self: object, **keys: object) -> dict[str, Tensor]:
        asked.update(keys)
        return given

    monkeypatch.setattr(torchvision_models.SqueezeNet1_1_Weights, "get_state_dict", get_state_dict)
    loaded = built("torchvision:squeezenet1_1", 64, pretrained=True).state_dict()
    fresh = built("torchvision:squeezenet1_1", 64).state_dict()
    for name, value in loaded.items():
        source = fresh if name.startswith("classifier") else given
        assert torch.equal(value, source[name])
    assert asked == {"check_hash": True, "weights_only": True}  # nothing is unpickled
    given["features.0.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"do not fit 1 tensors .*such as features\.0\.weight"):
        built("torchvision:squeezenet1_1", 64, pretrained=True)
    with pytest.raises(UserError, match=r"for 3 channels, and data.channels = 1"):
        built("torchvision:squeezenet1_1", 64, channels=1, pretrained=True)


class Sidelong(nn.Module):
    """A network that builds a layer behind its classifier, and looks at values."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_chans, num_classes)
        self.aux = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        if images.abs().max() > 1e6:
            raise ValueError("not normalised")
        logits: Tensor = self.head(images.mean((2, 3)))
        return logits


def test_the_last_layer_of_one_s_own_is_its_classifier_if_it_gives_the_logits() -> None:
    own = HERE.replace("own_net", "Sidelong")
    model = built(own)
    assert classifiers(model) == []
    with pytest.raises(UserError, match="none that it names"):
        built(own, head={"name": "cosine"})
    assert len(classifiers(built(HERE))) == 1
    with torch.device("meta"):  # where nothing can look at values
        assert built(own).head.weight.is_meta


def test_a_model_of_one_s_own() -> None:
    model = built(HERE, options={"width": 6})
    assert model[0].weight.shape == (6, 3, 3, 3)
    assert classifiers(model) == [model[-1]]
    again = built(HERE, options={"width": 6})
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)  # by the seed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:Net", r"cannot be imported \(ModuleNotFoundError: .*on PYTHONPATH"),
        (f"{__name__}:no_such", r"cannot be imported \(AttributeError: "),
        (f"{__name__}:HERE", r"is a str; name a class or a function"),
        (f"{__name__}:not_a_net", r"gives a int, and has to give an nn.Module"),
        (f"{__name__}:two_outputs", r"gives \[2, 8\] for two images, and the data has 7 classes"),
        ("resnet5o", r"is no timm model; did you mean resnet50"),
        ("torchvision:resnet5o", r"did you mean torchvision:resnet50"),
        ("torchvision:fcn_resnet50", r"is no classification model of torchvision"),
        ("lenet", r"did you mean .*lenet5"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        built(name)


def test_a_module_of_one_s_own_that_fails(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "failing_net.py").write_text("raise ValueError('not today')")
    with pytest.raises(UserError, match=r"\(ValueError: not today\)"):
        built("failing_net:Net")
    assert "failing_net" not in sys.modules


def test_images_that_a_model_cannot_take() -> None:
    with pytest.raises(UserError, match=r"cannot take images of \[3, 2, 2\] \(RuntimeError: "):
        built(HERE, size=2)


def test_options_that_a_model_does_not_know() -> None:
    with pytest.raises(UserError, match=r"own_net fails \(fresh weights, .*'depth': 3"):
        built(HERE, options={"depth": 3})


def test_a_checkpoint_fits_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.safetensors"
    given = own_net(9, 3)
    save_file(given.state_dict(), path)
    loaded = built(HERE, checkpoint=str(path)).state_dict()
    for name, value in loaded.items():
        assert torch.equal(value, given.state_dict()[name]) or name.startswith("5.")
    said = capsys.readouterr().err
    assert "7 of the model's 9 tensors are loaded; fresh: 5.weight, 5.bias" in said
    assert "the file's classifier is for 9 classes, this run has 7" in said
    other = f"{tmp_path}/other.safetensors"
    save_file(own_net(7, 1).state_dict(), other)  # of other channels, which timm's rule converts
    first = built(HERE, checkpoint=other).state_dict()["0.weight"]
    assert torch.allclose(first.sum(1, keepdim=True), own_net(7, 1).state_dict()["0.weight"])
    lacking = own_net(7, 3).state_dict()
    del lacking["0.weight"]
    save_file(lacking, other)
    with pytest.raises(UserError, match=r"it does not fit this model: no: 0.weight"):
        built(HERE, checkpoint=other)


def test_all_of_torchvision_s_names_are_its_classifiers() -> None:
    assert {"alexnet", "resnet50", "vit_b_16"} <= set(torchvision_names())
    assert not any("fcn" in name or "rcnn" in name for name in torchvision_names())
