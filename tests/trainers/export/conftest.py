"""Two members of the digits, unlike in size, crop and normalisation, and one file of both."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from bigbatch.configs.load import load_recipe
from bigbatch.data.index import open_index
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.export.write import export
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.models.weights_file import describe
from bigbatch.trainers.recovery.tensor_files import save_weights

COMBINATION = Combination(temperature=1.5, reject_below=0.4)


def make_member(
    folder: Path, name: str, classes: Sequence[str], seed: int, *overrides: str
) -> Member:
    """Fresh weights of a recipe, whose logits are far enough apart to tell images."""
    recipe = load_recipe("digits", overrides)
    model = build_model(
        recipe.model, classes=len(classes), channels=recipe.data.channels, seed=seed
    )
    with torch.no_grad():
        model.get_classifier().weight.mul_(100)
    info = describe(recipe, classes)
    path = folder / f"{name}.safetensors"
    save_weights(model, path, info)
    return Member(f"digits/{name}", path, recipe, info.classes)


@pytest.fixture(scope="session")
def members(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    folder = tmp_path_factory.mktemp("members")
    classes = open_index(digits / "val").classes
    # Shards of digits are 8 pixels wide, so the second one's crop lies between pixels.
    shared = (f"data.path={digits}", "model.name=test_resnet", "model.options.drop_path_rate=0.5")
    return [
        make_member(folder, "cycle-01", classes, 1, *shared),
        make_member(
            folder, "cycle-02", classes, 2, *shared,
            "data.image_size=24", "evaluate.image_size=28", "evaluate.crop_fraction=0.9",
            "augment.mean=[0.2]", "augment.std=[0.3]",
        ),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def onnx_file(members: list[Member], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once, since the exporter takes seconds. Nothing may change it."""
    path = tmp_path_factory.mktemp("exported") / "two.onnx"
    export(path, members, COMBINATION)
    return path


@pytest.fixture(scope="session")
def session(onnx_file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(onnx_file, options, providers=["CPUExecutionProvider"])


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
