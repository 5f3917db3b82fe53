"""The check of a file: against evaluation, in a process of its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bigbatch.configs.errors import UserError
from bigbatch.data.index import open_index
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.export import check as checks
from bigbatch.trainers.export import standalone
from bigbatch.trainers.export.check import Check, check_file, check_possible
from bigbatch.trainers.export.write import export
from bigbatch.trainers.recovery.tensor_files import save_weights
from tests.helpers.micro_batches import pictures, write_shards
from tests.trainers.export.conftest import COMBINATION, make_member


def test_a_file_is_as_evaluated(onnx_file: Path, members: list[Member], digits: Path) -> None:
    index = open_index(digits / "val")
    found = check_file(onnx_file, members, COMBINATION, index, images=20)
    assert found.passed
    assert found.images == len(range(0, len(index), -(-len(index) // 20)))
    assert found.same_labels == found.images
    assert found.reduced == 0
    assert found.key in set(index.keys())
    assert 0 < found.difference < 2e-5


def test_another_combination_or_member_is_found_out(
    onnx_file: Path, members: list[Member], digits: Path
) -> None:
    index = open_index(digits / "val")
    for there, combination in ((members, Combination()), (members[::-1][:1], COMBINATION)):
        found = check_file(onnx_file, there, combination, index, images=3)
        assert not found.passed
        assert found.values()["passed"] is False
        assert f"NOT as evaluated, {found.key} least" in str(found)


def test_a_file_that_gives_nan_differs(
    onnx_file: Path, members: list[Member], digits: Path, tmp_path: Path
) -> None:
    model = onnx.load(onnx_file)
    (bias,) = [t for t in model.graph.initializer if t.name == "networks.0.fc.bias"]
    bias.CopyFrom(numpy_helper.from_array(np.full(10, np.nan, np.float32), bias.name))
    onnx.save(model, tmp_path / "nan.onnx")
    index = open_index(digits / "val")
    assert not check_file(tmp_path / "nan.onnx", members, COMBINATION, index, images=3).passed


def test_a_member_without_finite_logits_is_named(
    onnx_file: Path, members: list[Member], digits: Path, tmp_path: Path
) -> None:
    network = members[1].build()
    network.get_classifier().bias.data[0] = np.inf
    save_weights(network, tmp_path / "inf.safetensors", members[1].info)
    both = [members[0], replace(members[1], weights=tmp_path / "inf.safetensors")]
    with pytest.raises(UserError, match=r"digits/cycle-02 gives logits that are not finite"):
        check_file(onnx_file, both, COMBINATION, open_index(digits / "val"), images=3)


def test_a_file_that_does_not_run_is_an_error(
    members: list[Member], digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"no\.onnx does not run: .*; export it again"):
        check_file(tmp_path / "no.onnx", members, COMBINATION, open_index(digits / "val"), images=3)


def test_without_onnxruntime_it_says_what_to_install(
    onnx_file: Path, members: list[Member], digits: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'bigbatch\[export\]'"):
        check_possible(onnx_file)
    check_possible(tmp_path / "torch.pt2")
    with pytest.raises(UserError, match="weights alone"):
        check_possible(tmp_path / "model.safetensors")
    # Found here, but not by the process that runs it.
    script = tmp_path / "standalone.py"
    text = Path(standalone.__file__).read_text()
    script.write_text(text.replace('("bigbatch", ', '("bigbatch", "onnxruntime", '))
    monkeypatch.setattr(standalone, "__file__", str(script))
    with pytest.raises(UserError, match=r"onnxruntime.*pip install 'bigbatch\[export\]'"):
        check_file(onnx_file, members, COMBINATION, open_index(digits / "val"), images=3)


def test_says_what_evaluation_reads_at_a_reduced_size() -> None:
    text = str(Check(images=9, difference=3e-8, key="a", reduced=4, same_labels=8))
    assert "9 images" in text
    assert "as evaluated (largest difference 3.0e-08)" in text
    assert "the label of `evaluate` for 8" in text
    assert "4 of them are decoded there at a reduced size" in text


@pytest.mark.slow
def test_photos_of_all_sizes_and_a_program(tmp_path: Path) -> None:
    """Colour, no two of one size, some of which evaluation decodes at a half."""
    index = write_shards(tmp_path / "shards" / "val", pictures())
    members = [
        make_member(
            tmp_path, name, index.classes, seed, f"model.name={name}", "data.channels=3",
            f"data.image_size={size}", "augment.mean=[0.5,0.4,0.3]", "augment.std=[0.2,0.2,0.3]",
            "augment.affine=null", "augment.jitter=null", f"evaluate.crop_fraction={fraction}",
        )
        for seed, (name, size, fraction) in enumerate(
            [("test_resnet", 16, 1.0), ("test_efficientnet", 24, 0.9)]
        )
    ]  # fmt: skip
    for name in ("both.onnx", "both.pt2"):
        export(tmp_path / name, members, Combination("vote"))
        found = check_file(tmp_path / name, members, Combination("vote"), index, images=10**6)
        assert found.passed
        assert found.images == len(index)
        assert 0 < found.reduced < len(index)
        assert found.same_labels >= 0.9 * len(index)
