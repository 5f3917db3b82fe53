"""Weights of one's own, trained again: what is loaded, what starts fresh, and what is said."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from bigbatch.configs.errors import UserError
from bigbatch.configs.model import Model
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.models.weights_file import WeightsInfo
from bigbatch.trainers.recovery.tensor_files import save_weights

DIGITS = WeightsInfo("resnet10t", tuple("0123456789"), (0.3,) * 3, (0.4,) * 3, 32, 3)
State = dict[str, Tensor]
Say = Callable[[], str]


@pytest.fixture(autouse=True)
def said(capsys: pytest.CaptureFixture[str]) -> Say:
    return lambda: capsys.readouterr().err


def save(
    path: Path,
    info: WeightsInfo | None = DIGITS,
    *,
    name: str = "resnet10t",
    classes: int = 10,
    channels: int = 3,
    stem: str = "standard",
) -> State:
    config = Model.model_validate({"name": name, "stem": stem})
    model = build_model(config, classes=classes, channels=channels, seed=1)
    save_weights(model, path, info)
    return model.state_dict()


def start(path: Path | None, info: WeightsInfo | None = DIGITS, **others: object) -> State:
    """The weights with which a run of this kind starts."""
    config = {"name": "resnet10t", "checkpoint": path and str(path), **others}
    classes, channels = (len(info.classes), info.channels) if info else (10, 3)
    model = build_model(
        Model.model_validate(config), classes=classes, channels=channels, seed=0, info=info
    )
    return model.state_dict()


def assert_same(found: State, expected: State, names: set[str] | None = None) -> None:
    for name in names or expected:
        assert torch.equal(found[name], expected[name]), name


HEAD = {"fc.weight", "fc.bias"}


def test_the_same_classes_keep_the_classifier(tmp_path: Path, said: Say) -> None:
    given = save(tmp_path / "w.safetensors")
    assert_same(start(tmp_path / "w.safetensors"), given)
    count = len(given)
    text = said()
    assert f"w.safetensors: {count} of the model's {count} tensors are loaded\n" in text
    assert "fresh" not in text


def test_for_other_classes_the_classifier_is_fresh(tmp_path: Path, said: Say) -> None:
    given = save(tmp_path / "w.safetensors")
    info = replace(DIGITS, classes=tuple("abcdefghij"))
    found = start(tmp_path / "w.safetensors", info)
    text = said()
    assert_same(found, given, given.keys() - HEAD)
    assert_same(found, start(None, info), HEAD)
    assert "are others (10 and 10 of them): number 0 is '0' there, 'a' here; the class" in text
    assert "the classifier starts fresh" in text
    assert "; fresh: fc.weight, fc.bias" in text
    assert "; left over in the file: fc." in text


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("0123456798", "in another order: number 8 is '8' there, '9' here; .* rows of 10 classes"),
        ("9876543210", "another order: number 0 is '0' there, '9' here; .* rows of 10 classes"),
        ("012345678", r"others \(10 and 9 of them\).* rows of 9 .*; those of '9' are left over"),
        (
            "x5y1",
            r"\(10 and 4 of .* rows of 2 classes.*; those of 'x', 'y' start fresh; those of '0'",
        ),
        ("9876543210x", "rows of 10 classes are taken by name; those of 'x' start fresh\n"),
    ],
)
@pytest.mark.parametrize("channels", [3, 1])  # which goes through timm's conversion
def test_rows_of_the_classifier_go_to_the_classes_of_their_names(
    tmp_path: Path, said: Say, classes: str, message: str, channels: int
) -> None:
    given = save(tmp_path / "w.safetensors", name="test_resnet")
    info = replace(DIGITS, classes=tuple(classes), channels=channels)
    found = start(tmp_path / "w.safetensors", info, name="test_resnet")
    text = said()
    assert re.search(message, text)
    assert "fresh: fc" not in text
    assert "left over in the file" not in text
    fresh = start(None, info, name="test_resnet")
    for name in HEAD:
        for number, label in enumerate(classes):
            known = label in DIGITS.classes
            expected = given[name][DIGITS.classes.index(label)] if known else fresh[name][number]
            assert torch.equal(found[name][number], expected), (name, label)
    assert_same(found, given, given.keys() - HEAD - {"conv1.0.weight"})


def test_a_classifier_of_another_kind_gives_no_rows(tmp_path: Path, said: Say) -> None:
    """The file's is wider than that of the same name here."""
    state = save(tmp_path / "w.safetensors")
    model = build_model(Model(name="resnet10t"), classes=10, channels=3, seed=1)
    model.fc = torch.nn.Linear(7, 10)
    save_weights(model, tmp_path / "w.safetensors", DIGITS)
    info = replace(DIGITS, classes=tuple("9876543210"))
    found = start(tmp_path / "w.safetensors", info)
    assert_same(found, state, state.keys() - HEAD)
    assert_same(found, start(None, info), HEAD)
    assert "its classifier has no row for each class; this one starts fresh" in said()


@pytest.mark.parametrize("where", ["weight", "description"])
def test_a_flipped_bit_is_no_start(tmp_path: Path, where: str) -> None:
    path = tmp_path / "w.safetensors"
    save(path)
    whole = path.read_bytes()
    place = len(whole) - 1 if where == "weight" else whole.index(b'"bigbatch"') + 8
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(
        UserError, match=r"w.safetensors is damaged: its weights or metadata are no"
    ):
        start(path)


def test_weights_that_name_no_classes(tmp_path: Path, said: Say) -> None:
    """As older versions and other programs write them: the counts decide, and it is said."""
    given = save(tmp_path / "w.safetensors", None)
    assert_same(start(tmp_path / "w.safetensors"), given)
    assert "one for 10 classes, but the file names none; they must be this run's" in said()
    info = replace(DIGITS, classes=tuple("abc"))
    assert_same(start(tmp_path / "w.safetensors", info), start(None, info), HEAD)
    assert "the file's classifier is for 10 classes, this run has 3: it is fresh" in said()


def test_as_many_classes_as_the_registry_has(tmp_path: Path, said: Say) -> None:
    save(tmp_path / "w.safetensors", None)
    info = replace(DIGITS, classes=tuple(map(str, range(1000))))
    assert_same(start(tmp_path / "w.safetensors", info), start(None, info), HEAD)
    assert "the file's classifier is for 10 classes, this run has 1,000" in said()


def test_a_small_stem_is_loaded_too(tmp_path: Path, said: Say) -> None:
    given = save(tmp_path / "w.safetensors", name="resnet18", stem="small")
    found = start(tmp_path / "w.safetensors", name="resnet18", stem="small")
    assert_same(found, given)
    assert "fresh" not in said()


def test_a_stem_of_another_kind_is_fresh(tmp_path: Path, said: Say) -> None:
    given = save(tmp_path / "w.safetensors", name="resnet18")
    found = start(tmp_path / "w.safetensors", name="resnet18", stem="small")
    assert_same(found, given, given.keys() - {"conv1.weight"})
    assert (
        f"{len(given) - 1} of the model's {len(given)} tensors are loaded; fresh: conv1" in said()
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_converted(tmp_path: Path, said: Say, channels: int) -> None:
    there = replace(DIGITS, channels=channels)
    here = replace(DIGITS, channels=4 - channels)
    given = save(tmp_path / "w.safetensors", there, channels=channels)
    found = start(tmp_path / "w.safetensors", here)
    assert_same(found, given, given.keys() - {"conv1.0.weight"})  # the classifier too
    first, expected = found["conv1.0.weight"], given["conv1.0.weight"]
    if channels == 3:
        torch.testing.assert_close(first, expected.sum(1, keepdim=True))
    else:  # spread, so that a gray image gives what it gave
        torch.testing.assert_close(first.sum(1, keepdim=True), expected)
    text = said()
    assert f"trained with data.channels = {channels}, this run has {4 - channels}; set" in text
    how = "summed" if channels == 3 else "divided among 3"
    assert f"conv1.0.weight: its {channels} input channels are {how}, as timm does" in text


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [("torchvision:resnet18", 3, 1), ("lenet5", 3, 1), ("lenet5", 1, 3), ("lenet5", 3, 5)],
)
def test_channels_are_converted_for_models_that_timm_has_not(
    tmp_path: Path, said: Say, name: str, there: int, here: int
) -> None:
    config = {"name": name}
    sizes = {"classes": 10, "image_size": 32}
    fresh = build_model(Model.model_validate(config), channels=there, seed=1, **sizes)
    info = replace(DIGITS, model=name, channels=there)
    save_weights(fresh, tmp_path / "w.safetensors", info)
    config["checkpoint"] = str(tmp_path / "w.safetensors")
    model = build_model(
        Model.model_validate(config),
        channels=here,
        seed=0,
        info=replace(info, channels=here),
        **sizes,
    )
    given, found = fresh.state_dict(), model.state_dict()
    first = "conv1.weight" if "conv1.weight" in given else "0.weight"
    assert_same(found, given, given.keys() - {first})
    assert found[first].shape[1] == here
    gray = torch.rand(2, 1, 32, 32)
    model.eval(), fresh.eval()
    if here != 1:  # a gray image gives what it gave
        same = model(gray.expand(2, here, 32, 32)), fresh(gray.expand(2, there, 32, 32))
    else:
        same = model(gray), fresh(gray.expand(2, 3, 32, 32))
    if here != 5:  # timm repeats three channels, of which two stand twice
        torch.testing.assert_close(*same, rtol=1e-4, atol=1e-5)
    assert f"{first}: its {there} input channels are" in said()


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (("a", "b"), "its classifier is for 1,000 classes, this run has 2: fresh"),
        (tuple(map(str, range(1000))), "since there are 1,000 classes too, but by their numbers"),
        (tuple(timm.data.ImageNetInfo("imagenet-1k").label_names()), None),
    ],
)
def test_what_becomes_of_a_pretrained_classifier(
    tmp_path: Path, said: Say, monkeypatch: pytest.MonkeyPatch, classes: tuple[str, ...], says: str
) -> None:
    """ImageNet's classes by their names, others by count alone: never in silence."""
    create = timm.create_model

    def offline(name: str, pretrained: bool, **more: object) -> torch.nn.Module:
        return create(name, pretrained=False, **more)  # the config is that of the hub's weights

    monkeypatch.setattr(timm, "create_model", offline)
    config = Model(name="resnet18.a1_in1k", pretrained=True)
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    info = replace(DIGITS, model=config.name, classes=classes, mean=mean, std=std)
    build_model(config, classes=len(classes), channels=3, seed=0, info=info)
    text = said()
    assert (says in text) if says else text == ""
    other = replace(info, mean=(0.5,) * 3)
    build_model(config, classes=len(classes), channels=3, seed=0, info=other)
    assert "augment.mean = [0.485, 0.456, 0.406], this run has [0.5, 0.5, 0.5]" in said()


def test_other_pixels_are_said_with_the_remedy(tmp_path: Path, said: Say) -> None:
    save(tmp_path / "w.safetensors")
    start(
        tmp_path / "w.safetensors", replace(DIGITS, mean=(0.5,) * 3, std=(1.0,) * 3, image_size=8)
    )
    text = said()
    assert "augment.mean = [0.3, 0.3, 0.3], this run has [0.5, 0.5, 0.5]" in text
    assert "set augment.mean=[0.3, 0.3, 0.3]" in text
    assert "set augment.std=[0.4, 0.4, 0.4]" in text
    assert "data.image_size = 32, this run has 8" in text


def test_a_transformer_for_other_sizes_goes_through_timm(tmp_path: Path, said: Say) -> None:
    """Its position embedding is resampled; the classifier of its own classes stays."""
    name = "vit_tiny_patch16_224"
    options = {"img_size": 32, "depth": 1}
    config = Model(name=name, options={**options, "img_size": 64})
    given = build_model(config, classes=10, channels=3, seed=1)
    save_weights(given, tmp_path / "w.safetensors", DIGITS)
    found = start(tmp_path / "w.safetensors", name=name, options=options)
    state = given.state_dict()
    assert found["pos_embed"].shape == (1, 5, 192)
    assert_same(found, state, state.keys() - {"pos_embed"})
    assert f"{len(state)} of the model's {len(state)} tensors are loaded" in said()


def test_another_model_s_weights_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", name="resnet18")
    with pytest.raises(UserError, match="cannot build resnet10t"):
        start(tmp_path / "w.safetensors")


def test_quiet_says_nothing(tmp_path: Path, said: Say) -> None:
    save(tmp_path / "w.safetensors")
    config = Model(name="resnet10t", checkpoint=str(tmp_path / "w.safetensors"))
    build_model(config, classes=9, channels=3, seed=0, info=None, quiet=True)
    assert said() == ""


def test_timm_loads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    given = save(path)
    model = timm.create_model("resnet10t", num_classes=10, checkpoint_path=str(path))
    assert_same(model.state_dict(), given)
