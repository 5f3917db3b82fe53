"""Features of a network that was never trained here, and the advice that rests on them."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from bigbatch.configs.load import load_recipe
from bigbatch.configs.model import Model
from bigbatch.data.batch import Decoding
from bigbatch.data.index import open_index
from bigbatch.data.loader import eval_batches
from bigbatch.launcher.cli.main import cli
from bigbatch.trainers.inference.__main__ import main
from bigbatch.trainers.models.build import build_augmenter, build_model
from bigbatch.trainers.recovery.tensor_files import save_weights
from tests.helpers.runs import SMALL

CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network of 7 other classes that nobody here has trained, and its file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    model = build_model(Model(name="test_resnet"), classes=7, channels=1, seed=5)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    save_weights(model, path)
    return model.eval(), path


def keys_of(digits: Path, weights: Path) -> list[str]:
    return [f"data.path={digits}", f"model.checkpoint={weights}", *SMALL]


def call(command: str, keys: list[str], *more: object) -> list[str]:
    return [command, "digits", *(f"--set={key}" for key in keys), *map(str, more)]


def test_features_of_every_image_in_its_order(
    network: tuple[nn.Module, Path],
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, weights = network
    keys, out = keys_of(digits, weights), tmp_path / "f.parquet"
    arguments = call("features", keys, "--source", digits / "val", "--out", out, "--batch", 50)
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "the file's classifier is for 7 classes, this run has 10: it is fresh" in said.err
    assert f"{out}: features of" in said.out
    table, index = pq.read_table(out), open_index(digits / "val")
    assert table.column_names == ["key", "target", "reason", "features"]
    assert table["key"].to_pylist() == index.keys()
    assert table["target"].to_pylist() == [CLASSES[label] for label in index.label]
    recipe = load_recipe("digits", keys)
    augmenter = build_augmenter(recipe, 10, torch.device("cpu"))
    decoding = Decoding(32, channels=1, workers=0, threads=1, view=augmenter.eval_view)
    batch = next(iter(eval_batches(index, decoding, batch=50, rank=0, world=1)))
    expected: list[torch.Tensor] = []
    plain: Any = model
    handle = plain.fc.register_forward_pre_hook(lambda layer, x: expected.append(x[0]))
    with torch.no_grad():
        model(augmenter.evaluate(batch))
    handle.remove()
    found = np.array(table["features"].to_pylist()[:50], np.float32)
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-4, atol=1e-5)


def test_without_the_recipes_data_and_with_joined_stages(
    network: tuple[nn.Module, Path], digits: Path, tmp_path: Path
) -> None:
    keys = keys_of(tmp_path / "nowhere", network[1])
    out = tmp_path / "f.parquet"
    keys += ["model.joined_stages=[layer2]"]
    assert main(call("features", keys, "--source", digits / "test", "--out", out)) == 0
    table = pq.read_table(out)
    assert table["target"].null_count == len(table)
    assert {len(row) for row in table["features"].to_pylist()} == {48 + 96}


def test_random_weights_have_no_features(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"data.path={digits}", *SMALL]
    arguments = call("features", keys, "--source", digits / "val", "--out", tmp_path / "f.csv")
    assert main(arguments) == 2
    assert "starts from no weights, so that its features would be random" in capsys.readouterr().err


def test_advice_on_transfer(
    network: tuple[nn.Module, Path], digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = keys_of(digits, network[1])
    assert main(call("transfer", keys, "--samples", 300, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"]["samples"] == 300
    assert found["measured"]["features"] == 96
    assert 0.5 < found["measured"]["accuracy"] <= 1  # digits are easy, for random layers too
    counts = open_index(digits / "train").class_counts
    assert found["samples_of_a_class"] == np.median(counts)
    assert main(call("transfer", keys, "--samples", 300, "--small", 10_000)) == 0
    text = capsys.readouterr().out
    assert "size        small:" in text
    given = shlex.join(["digits", *keys])  # as it was asked: by its file, with the changes to it
    assert f"bigbatch train {given} 'transfer={{name: head}}'" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["features", "digits", "x", "--out", "f.txt"], "the name must end in .parquet or .csv"),
        (["features", "digits", "x", "modle.name=x", "--out", "f.csv"], "modle"),
        (["advise", "--transfer", "digits", "--plot", "a.png"], "--plot draws batch sizes"),
        (["advise", "--transfer", "digits", "--phases", "2"], "read for advice from a RUN, and"),
        (["advise", "x", "--small", "2"], "--small: read for advice from --transfer, and"),
        (["advise", "x", "--transfer", "digits"], "name one of a RUN, --points"),
    ],
)
def test_what_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, arguments)
    assert says in str(result.exception)
