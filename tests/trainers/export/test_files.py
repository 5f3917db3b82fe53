"""The file that an export leaves, opened with what others open it with."""

import ast
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.export import ExportedProgram

from bigbatch.configs.errors import UserError
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.schema import Recipe
from bigbatch.data.index import open_index
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.export import files, standalone
from bigbatch.trainers.export.files import onnx_bytes, program_bytes, trace
from bigbatch.trainers.export.served import Served
from bigbatch.trainers.export.write import export, served
from tests.trainers.export.conftest import COMBINATION, noise
from tests.trainers.export.test_served import COMBINATIONS, Small, by_hand, member

RANDOM = {"Dropout", "RandomUniform", "RandomUniformLike", "RandomNormal", "RandomNormalLike",
          "Bernoulli", "Multinomial"}  # fmt: skip


@pytest.mark.parametrize(
    ("count", "height", "width"), [(1, 8, 8), (7, 8, 8), (64, 8, 8), (1, 333, 250), (3, 40, 31)]
)
def test_onnx_gives_probabilities_of_torch(
    session: onnxruntime.InferenceSession,
    members: list[Member],
    count: int,
    height: int,
    width: int,
) -> None:
    """One input of any N, H and W; the example of the trace had two images of another size."""
    pixels = noise(count, height, width, 1)
    probabilities, label, rejected = session.run(None, {"pixels": pixels})
    with torch.no_grad():
        network = served(members, COMBINATION)
        expected = by_hand(list(network.members), COMBINATION, torch.from_numpy(pixels))
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=2e-5)
    assert label.tolist() == expected.argmax(1).tolist()
    assert rejected.tolist() == (expected.max(1) < COMBINATION.reject_below).tolist()
    assert probabilities.dtype == np.float32
    assert probabilities.max() <= 1
    assert np.ptp(expected) > 0.3  # or they would say little


def test_inputs_and_outputs_have_names_and_free_axes(
    session: onnxruntime.InferenceSession,
) -> None:
    (pixels,) = session.get_inputs()
    assert (pixels.name, pixels.type, pixels.shape) == (
        "pixels",
        "tensor(uint8)",
        ["N", "H", "W", 1],
    )
    found = {o.name: (o.type, o.shape) for o in session.get_outputs()}
    assert found == {
        "probabilities": ("tensor(float)", ["N", 10]),
        "label": ("tensor(int64)", ["N"]),
        "rejected": ("tensor(bool)", ["N"]),
    }
    assert session.get_outputs()[0].name == "probabilities"


def test_metadata_say_how_to_use_it_and_where_it_came_from(
    session: onnxruntime.InferenceSession, members: list[Member], digits: Path
) -> None:
    found = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert found["classes"] == list(members[0].classes)
    assert found["channels"] == 1
    assert found["temperature"] == COMBINATION.temperature
    assert found["reject_below"] == COMBINATION.reject_below
    assert Combination.from_json(found["combination"]) == COMBINATION
    assert found["bigbatch_version"] == version("bigbatch")
    index_hash = open_index(digits / "train").hash
    for entry, one in zip(found["members"], members, strict=True):
        assert entry["name"] == one.name
        assert entry["mean"] == one.recipe.augment.mean
        assert entry["std"] == one.recipe.augment.std
        assert entry["image_size"] == one.recipe.eval_size
        assert entry["crop_fraction"] == one.recipe.evaluate.crop_fraction
        assert Recipe.model_validate(entry["recipe"]) == one.recipe
        assert entry["recipe_hash"] == recipe_hash(one.recipe)
        assert entry["data_hash"] == index_hash
    # What they share stands at the top as well, and what they do not share does not.
    assert found["data_hash"] == index_hash
    assert found["model"] == "test_resnet"
    assert not {"mean", "std", "image_size", "recipe", "name"} & found.keys()


def test_there_is_no_file_beside_and_none_is_named(onnx_file: Path) -> None:
    """The exporter's own way writes weights into a second file, whose first name it keeps."""
    assert sorted(p.name for p in onnx_file.parent.iterdir()) == ["two.onnx", "two.onnx.md"]
    model = onnx.load(onnx_file, load_external_data=False)
    assert not [t.name for t in model.graph.initializer if t.external_data]
    onnx.checker.check_model(model, full_check=True)


def test_a_renamed_file_computes_the_same(
    onnx_file: Path, session: onnxruntime.InferenceSession, tmp_path: Path
) -> None:
    shutil.copy(onnx_file, tmp_path / "other.onnx")
    other = onnxruntime.InferenceSession(tmp_path / "other.onnx")
    pixels = noise(2, 8, 8, 1)
    before, after = (s.run(["probabilities"], {"pixels": pixels})[0] for s in (session, other))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)


def test_nothing_random_is_in_it(onnx_file: Path) -> None:
    """A network left in train mode would bring stochastic depth and dropout along."""
    model = onnx.load(onnx_file)
    operations = {node.op_type for graph in (model.graph, *model.functions) for node in graph.node}
    assert not operations & RANDOM


@pytest.fixture(scope="module")
def traced() -> tuple[Served, ExportedProgram]:
    """A small network, which is in train mode when it is traced, and its program."""
    network = Served([member(1)], Combination())
    network.train()
    return network, trace(network)


def test_a_network_in_train_mode_gives_the_program_of_evaluation(
    traced: tuple[Served, ExportedProgram],
) -> None:
    plain, program = Served([member(1)], Combination()), traced[1].module()
    pixels = torch.from_numpy(noise(5, 30, 40, 3))
    for _ in range(2):
        torch.testing.assert_close(program(pixels)[0], plain(pixels)[0])


def test_a_program_takes_any_number_and_size_and_knows_its_classes(
    traced: tuple[Served, ExportedProgram], tmp_path: Path
) -> None:
    network, program = traced
    (tmp_path / "one.pt2").write_bytes(program_bytes(program, '{"classes": ["a"]}'))
    extra = {files.PROGRAM_EXTRA: ""}
    loaded = torch.export.load(tmp_path / "one.pt2", extra_files=extra).module()
    assert json.loads(extra[files.PROGRAM_EXTRA]) == {"classes": ["a"]}
    for shape in ((1, 50, 50, 3), (7, 333, 250, 3), (64, 20, 31, 3)):
        pixels = torch.from_numpy(noise(*shape))
        for found, expected in zip(loaded(pixels), network(pixels), strict=True):
            torch.testing.assert_close(found, expected)


def test_opens_with_nothing_of_this_product(onnx_file: Path, tmp_path: Path) -> None:
    """In an interpreter whose path holds NumPy, onnxruntime and what they need, and no more."""
    site = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "onnxruntime", "google", "flatbuffers", "packaging"):
        if (site / name).exists():
            (tmp_path / name).symlink_to(site / name)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import numpy as np, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(onnx_file)!r})\n"
        "pixels = np.zeros((2, 8, 8, 1), np.uint8)\n"
        "print(session.run(None, {'pixels': pixels})[0].shape)\n"
        "print([m for m in ('bigbatch', 'torch', 'timm', 'onnx') if m in sys.modules])\n"
        "import bigbatch\n"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["(2, 10)", "[]"], done.stderr
    assert "No module named 'bigbatch'" in done.stderr


def test_what_runs_a_check_imports_nothing_of_this_product() -> None:
    tree = ast.parse(Path(standalone.__file__).read_text())
    imports = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    outside = {"numpy", "onnxruntime", "torch"}
    assert outside < imports < outside | sys.stdlib_module_names | {"collections.abc"}


def test_more_weights_than_one_file_holds_are_refused(
    traced: tuple[Served, ExportedProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, program = traced
    size = sum(t.nbytes for t in network.state_dict().values())
    monkeypatch.setattr(files, "_ROOM", files._PROTOBUF_LIMIT - size + 1)
    with pytest.raises(UserError, match=r"2 GiB.*\.pt2"):
        onnx_bytes(network, program, {})


def test_a_network_that_cannot_be_traced_is_named() -> None:
    class Branching(Small):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) if images.sum() > 0 else images.sum((1, 2))

    network = Served([member(1, network=Branching(3, 1))], Combination())
    with pytest.raises(UserError, match="run/cycle-01"):
        trace(network)


def test_without_the_exporter_it_says_what_to_install(
    traced: tuple[Served, ExportedProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    network, program = traced
    with pytest.raises(UserError, match=r"pip install 'bigbatch\[export\]'"):
        onnx_bytes(network, program, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations(name: str) -> None:
    combination = replace(COMBINATIONS[name], temperature=0.7)
    network = Served([member(1), member(2), member(3)], combination)
    content = onnx_bytes(network, trace(network), {})
    pixels = noise(20, 30, 30, 3)
    found = onnxruntime.InferenceSession(content).run(None, {"pixels": pixels})[0]
    expected = by_hand(list(network.members), combination, torch.from_numpy(pixels))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


MODELS = {"test_resnet": 64, "test_vit": 160, "test_convnext": 96, "test_efficientnet": 128}


@pytest.mark.slow
@pytest.mark.parametrize("names", [*((name,) for name in MODELS), tuple(MODELS)])
def test_architectures(names: tuple[str, ...], tmp_path: Path) -> None:
    """Single models and an ensemble of all four, at batch 1, 7 and 64."""
    from tests.trainers.export.conftest import make_member

    classes = [f"class {i}" for i in range(12)]
    members = [
        make_member(
            tmp_path, name, classes, seed, f"model.name={name}", "data.channels=3",
            f"data.image_size={MODELS[name]}", "evaluate.crop_fraction=0.875",
            f"augment.mean=[0.48,0.45,0.4{seed}]", "augment.std=[0.23,0.22,0.22]",
            "augment.affine=null", "augment.jitter=null",
        )
        for seed, name in enumerate(names)
    ]  # fmt: skip
    export(tmp_path / "file.onnx", members, Combination())
    session = onnxruntime.InferenceSession(tmp_path / "file.onnx")
    network = served(members, Combination())
    for count, height, width in ((1, 333, 250), (7, 160, 160), (64, 90, 121)):
        pixels = noise(count, height, width, 3)
        found = session.run(None, {"pixels": pixels})[0]
        expected = by_hand(list(network.members), Combination(), torch.from_numpy(pixels))
        assert np.abs(found - expected).max() < 1e-4
