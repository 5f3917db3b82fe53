"""Where a model's weights come from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigbatch.configs.errors import UserError
from bigbatch.configs.model import Model
from bigbatch.trainers.models.build import build_model, choose_memory_format


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_checkpoint_is_where_training_starts(tmp_path: Path, pretrained: bool) -> None:
    """Also without `pretrained`."""
    path = tmp_path / "weights.safetensors"
    given = build_model(Model(name="resnet10t"), classes=7, channels=3, seed=1).state_dict()
    save_file(given, path)
    model = Model(name="resnet10t", pretrained=pretrained, checkpoint=str(path))
    loaded = build_model(model, classes=7, channels=3, seed=0).state_dict()
    assert all(torch.equal(loaded[name], given[name]) for name in given)
    missing = Model(name="resnet10t", checkpoint=str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match=r"none\.safetensors"):
        build_model(missing, classes=7, channels=3, seed=0)


def test_an_error_without_words_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(UserError, match=r"timm cannot build resnet10t .*: AssertionError$"):
        build_model(Model(name="resnet10t"), classes=7, channels=3, seed=0)


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "cache_dir"])
def test_options_name_no_weights(name: str) -> None:
    model = Model(name="resnet10t", options={name: "weights.safetensors"})
    with pytest.raises(UserError, match=rf"model\.options holds {name}: .* model\.checkpoint"):
        build_model(model, classes=7, channels=3, seed=0)


def test_only_a_gpu_keeps_channels_last() -> None:
    model = Model(name="resnet10t", channels_last=True)
    assert choose_memory_format(model, torch.device("cuda")) is torch.channels_last
    assert choose_memory_format(model, torch.device("cpu")) is torch.contiguous_format
    usual = choose_memory_format(Model(name="resnet10t"), torch.device("cuda"))
    assert usual is torch.contiguous_format
