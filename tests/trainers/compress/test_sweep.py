"""Variants of one member, side by side, in folders that other commands take."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bigbatch.configs.durations import parse
from bigbatch.configs.errors import UserError
from bigbatch.data.index import open_index
from bigbatch.trainers.compress import sweep as module
from bigbatch.trainers.compress.__main__ import main
from bigbatch.trainers.compress.candidates import Settings, write_network
from bigbatch.trainers.compress.pruning import prunable
from bigbatch.trainers.compress.sweep import check_packages, sweep
from bigbatch.trainers.compress.table import table_of
from bigbatch.trainers.compress.variants import make_variants
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.folder import Ensemble, open_ensemble, write_ensemble
from bigbatch.trainers.ensemble.members import Member, find_members
from bigbatch.trainers.evaluation.metrics import softmax
from bigbatch.trainers.export.write import export
from bigbatch.trainers.inference.cost import cost_of
from bigbatch.trainers.inference.forward import Forward
from bigbatch.trainers.models.compressed import compression_of
from bigbatch.trainers.planning.inputs import open_inputs
from tests.helpers.runs import untrained_run

CLASSES = tuple("0123456789")
TORCH = ["prune-0.8", "structured-0.8", "lowrank-0.8"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("ddp", "fp32")


@pytest.fixture(scope="module")
def member(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Member:
    run = untrained_run(tmp_path_factory.mktemp("runs") / "a", digits, CLASSES, snapshots=1)
    return find_members(run)[0]


@pytest.fixture(scope="module")
def swept(
    engine: Engine, member: Member, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compressed") / "small"
    variants = make_variants("prune,structured,lowrank,codebook", "0.8", None, "3")
    return folder, sweep(engine, member, variants, Settings(rounds=1), folder)


def test_every_variant_has_a_folder_and_figures(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, result = swept
    rows = {row["name"]: row for row in result["results"]}
    assert list(rows) == ["float32", *TORCH, "codebook-3bit"]
    assert json.loads((folder / "compression.json").read_text()) == json.loads(json.dumps(result))
    assert {p.name for p in folder.iterdir()} == {
        *rows, "compression.json", "pareto.png",
    } - {"float32"}  # fmt: skip
    plain = rows["float32"]
    assert plain["speedup"] == {"1": 1, "64": 1}
    for name in TORCH:
        assert rows[name]["nonzero"] < 0.85 * plain["nonzero"], name
    for name in ("prune-0.8", "structured-0.8", "lowrank-0.8", "codebook-3bit"):
        assert rows[name]["gzip_bytes"] < 0.5 * plain["gzip_bytes"], name
    # Zeros are stored, and computed with, like any other number.
    assert rows["prune-0.8"]["bytes"] >= 0.99 * plain["bytes"]
    assert rows["prune-0.8"]["flops"] == plain["flops"] > 2 * rows["structured-0.8"]["flops"]
    for row in rows.values():
        assert row["splits"].keys() == {"val", "test"}
        assert all(time > 0 for time in row["latency_ms"].values())


def test_what_is_stored_is_what_was_evaluated(
    swept: tuple[Path, dict[str, Any]], engine: Engine, member: Member, digits: Path
) -> None:
    folder, result = swept
    index = open_index(digits / "val")
    rows = result["results"][1:]
    members = [open_ensemble([folder / row["folder"]]).members[0] for row in rows]
    assert [m.name for m in members] == [f"{member.name}/{row['name']}" for row in rows]
    logits = Forward(engine, members).logits(index)
    assert logits is not None
    flops = [cost_of(Forward(engine, [m]), 1, 1.0)["flops_per_image"] for m in members]
    assert flops == [row["flops"] for row in rows]
    for row, own in zip(rows, logits, strict=True):
        accuracy = (softmax(own).argmax(1) == index.label).mean()
        assert row["splits"]["val"]["accuracy"] == accuracy


def test_pruned_weights_are_plain_ones_and_others_say_their_method(
    swept: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = swept
    for name in (*TORCH, "codebook-3bit"):
        with safe_open(folder / name / "members" / "00.safetensors", "pt") as file:
            method = file.metadata().get("compression")
        assert method == (None if name.startswith("prune") else name.partition("-")[0])


def test_a_compressed_member_is_exported(
    swept: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = swept
    for name in ("structured-0.8", "lowrank-0.8"):
        members = open_ensemble([folder / name]).members
        with pytest.raises(UserError, match=r"compressed by .* that timm cannot build"):
            export(tmp_path / "a.safetensors", members, Combination())
    (member,) = open_ensemble([folder / "codebook-3bit"]).members
    export(tmp_path / "a.safetensors", [member], Combination())
    weights = load_file(tmp_path / "a.safetensors")
    expected = member.build().state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    for name in prunable(member.build()):
        assert len(weights[name].unique()) <= 8 or weights[name].numel() < 300


@pytest.mark.slow
def test_fine_tuning_keeps_zeros_and_is_said(
    engine: Engine, member: Member, tmp_path: Path
) -> None:
    variants = make_variants("prune,codebook", "0.5")
    settings = Settings(taylor=True, images=8, finetune=parse("1 steps"), rounds=1)
    result = sweep(engine, member, variants, settings, tmp_path / "small")
    assert [row.get("fine_tuned") for row in result["results"]] == [None, True, False]
    (small,) = open_ensemble([tmp_path / "small" / "prune-0.5"]).members
    zeros = sum(int((w == 0).sum()) for w in prunable(small.build()).values())
    total = sum(w.numel() for w in prunable(small.build()).values())
    assert zeros == round(0.5 * total)
    assert result["settings"]["finetune"] == "1 steps"
    assert "fine-tuned 1 steps" in str(table_of(result).title)


def test_nothing_is_left_of_a_sweep_that_fails(
    engine: Engine, member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_network", fail)
    with pytest.raises(OSError, match="No space"):
        sweep(engine, member, make_variants("codebook"), Settings(rounds=1), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(engine: Engine, member: Member, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already; choose another --out"):
        sweep(engine, member, make_variants("prune"), Settings(), tmp_path)


@pytest.mark.parametrize(("method", "name"), [("structured", "torch_pruning"), ("int8", "onnx")])
def test_a_missing_package_is_named_with_the_remedy(
    method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda n: None if n == name else n)
    check_packages(make_variants("prune,lowrank,codebook"))
    message = rf"--method {method} needs {name}, .* pip install 'bigbatch\[compress\]'"
    with pytest.raises(UserError, match=message):
        check_packages(make_variants(method))


def test_of_several_members_one_is_to_be_chosen(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = untrained_run(tmp_path / "a", digits, CLASSES, snapshots=2)
    arguments = [str(run.path), "--method", "prune", "--out", str(tmp_path / "small")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "has 2 members (cycle-01, cycle-02)" in said
    assert "choose it with --members" in said
    assert not (tmp_path / "small").exists()


def test_what_has_a_temperature_is_refused(
    member: Member, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ensemble(tmp_path / "e", Ensemble((member,), Combination(temperature=2.0)))
    assert main([str(tmp_path / "e"), "--method", "prune", "--out", str(tmp_path / "small")]) == 2
    assert (
        "temperature, a threshold or weights, which would not be right" in capsys.readouterr().err
    )


def test_a_compressed_member_is_compressed_again_or_refused(
    swept: tuple[Path, dict[str, Any]], engine: Engine, tmp_path: Path
) -> None:
    folder, _ = swept
    (first,) = open_ensemble([folder / "structured-0.8"]).members
    for method in ("lowrank", "codebook"):
        with pytest.raises(UserError, match=f"compressed by structured already, and {method}"):
            sweep(engine, first, make_variants(method), Settings(), tmp_path / "no")
    (variant,), inputs = make_variants("prune"), open_inputs(first.recipe)
    second = write_network(tmp_path / "small", first, variant, [], inputs, Settings())
    assert compression_of(second.weights) == "structured"
    weights = [prunable(m.build()) for m in (first, second)]
    assert all(weights[0][n].shape == w.shape for n, w in weights[1].items())
    zeros = sum(int((w == 0).sum()) for w in weights[1].values())
    assert zeros >= round(0.5 * sum(w.numel() for w in weights[1].values()))


@pytest.mark.slow
def test_int8_is_a_file_from_pixels_with_all_convolutions_fused(
    engine: Engine, member: Member, digits: Path, tmp_path: Path
) -> None:
    import onnxruntime

    settings = Settings(images=64, rounds=1)
    result = sweep(engine, member, make_variants("int8"), settings, tmp_path / "small")
    plain, before, after = result["results"]
    assert after["convolutions"] == {"int8": 15, "float32": 0}
    assert before["convolutions"] == {"int8": 0, "float32": 15}
    assert after["bytes"] < 0.45 * before["bytes"]
    for split in ("val", "test"):
        assert before["splits"][split]["accuracy"] == plain["splits"][split]["accuracy"]
        assert after["splits"][split]["agreement"] > 0.9
    path = tmp_path / "small" / "int8" / "model.onnx"
    assert os.listdir(path.parent) == ["model.onnx"]
    session = onnxruntime.InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 51, 1)).astype(np.uint8)
    found, label = session.run(["probabilities", "label"], {"pixels": pixels})
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    assert (found.argmax(1) == label).all()
