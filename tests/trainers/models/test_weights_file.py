"""What a file of weights says of itself, and headers that cannot be true."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.trainers.models.weights_file import (
    WeightsInfo,
    describe,
    open_weights,
    read_header,
    read_info,
)
from bigbatch.trainers.recovery.tensor_files import write_tensors

INFO = WeightsInfo("resnet18", ("ant", 'naïve "bee"'), (0.1, 0.2, 0.3), (1.0, 0.5, 0.25), 32, 3)


def test_what_weights_are_for_travels_with_them(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros((), dtype=torch.int64)}
    write_tensors(tmp_path / "w.safetensors", tensors, INFO)
    header = read_header(tmp_path / "w.safetensors")
    assert read_info(header) == INFO
    assert header.tensors == {"a": ("F32", (2, 3)), "b": ("I64", ())}
    assert torch.equal(load_file(tmp_path / "w.safetensors")["a"], tensors["a"])
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    write_tensors(tmp_path / "plain", tensors)
    assert read_info(read_header(tmp_path / "plain")) is None
    # The tensors' bytes are the same, with and without it.
    assert (
        (tmp_path / "w.safetensors").read_bytes().endswith((tmp_path / "plain").read_bytes()[-32:])
    )


def test_a_recipe_says_what_its_weights_are_for() -> None:
    recipe = load_recipe("digits")
    info = describe(recipe, ("a", "b"))
    assert info.classes == ("a", "b")
    assert (list(info.mean), list(info.std)) == (recipe.augment.mean, recipe.augment.std)
    assert (info.image_size, info.channels) == (recipe.data.image_size, recipe.data.channels)
    assert info.model == recipe.model.name


def test_headers_of_other_writers(tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(3, 0), "y": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "w", {"anything": "else"})
    header = read_header(tmp_path / "w")
    assert header.tensors == {"x": ("F32", (3, 0)), "y": ("BF16", (5,))}
    assert read_info(header) is None


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, Any] = {
    "no mapping": [],
    "no entry": {"a": 7},
    "a field less": {"a": {"dtype": "F32", "shape": [2]}},
    "a dtype": {"a": entry(dtype="F33")},
    "no dtype": {"a": entry(dtype=["F32"])},
    "a negative shape": {"a": entry(shape=[-2])},
    "a shape of fractions": {"a": entry(shape=[2.0])},
    "a huge shape": {"a": entry(shape=[1 << 62, 1 << 62])},
    "no shape": {"a": entry(shape="2")},
    "three offsets": {"a": entry(offsets=[0, 4, 8])},
    "offsets that fall": {"a": entry(shape=[0], offsets=[8, 8]), "b": entry(offsets=[8, 0])},
    "offsets beyond the end": {"a": entry(shape=[4], offsets=[0, 16])},
    "offsets that end early": {"a": entry(shape=[1], offsets=[0, 4])},
    "a gap": {"a": entry(shape=[1], offsets=[4, 8])},
    "an overlap": {"a": entry(), "b": entry(shape=[1], offsets=[4, 8])},
    "metadata": {"a": entry(), "__metadata__": {"a": 1}},
}


def write_header(path: Path, header: Any) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    return path


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_cannot_be(tmp_path: Path, what: str) -> None:
    path = write_header(tmp_path / "w.safetensors", HEADERS[what])
    with pytest.raises(UserError, match=r"model\.checkpoint = .* is damaged: .*; give a file"):
        open_weights(path)
    with pytest.raises(SafetensorError):  # so does the format's own reader
        load_file(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", (1 << 63).to_bytes(8, "little"), b"\x00" * 8, b"\x10" + bytes(7) + b"{}"],
)
def test_files_without_a_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: a header of [\d,]+ bytes in a file of"):
        open_weights(tmp_path / "w.safetensors")


def test_a_deep_header(tmp_path: Path) -> None:
    path = write_header(tmp_path / "w.safetensors", b"[" * 100_000)
    with pytest.raises(UserError, match="is damaged: JSON that is nested too deeply"):
        open_weights(path)


@pytest.mark.parametrize(
    "change",
    [{"classes": "abc"}, {"classes": [1]}, {"mean": [None]}, {"channels": -1}, {"image_size": 2.5}],
)
def test_a_damaged_description(tmp_path: Path, change: dict[str, Any]) -> None:
    said = {"model": "a", "classes": ["b"], "mean": [0.0], "std": [1.0], "image_size": 8}
    text = json.dumps({**said, "channels": 1, **change})
    header = {"a": entry(), "__metadata__": {"bigbatch": text}}
    path = write_header(tmp_path / "w.safetensors", header)
    with pytest.raises(UserError, match="its description of what weights are trained for"):
        open_weights(path)


def test_a_later_version_may_say_more(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2)}
    write_tensors(tmp_path / "w", tensors, INFO)
    metadata = read_header(tmp_path / "w").metadata
    more = {**json.loads(metadata["bigbatch"]), "licence": "x"}
    save_file(tensors, tmp_path / "w", {"bigbatch": json.dumps(more)})
    assert read_info(read_header(tmp_path / "w")) == replace(INFO)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pth cannot be read \(No such file"):
        open_weights(tmp_path / "none.pth")
