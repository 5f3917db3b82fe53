"""`bigbatch augment`, and that what it draws is what any rank trains on."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from bigbatch.configs.load import load_recipe
from bigbatch.data.augment.pipeline import contact_sheet
from bigbatch.data.batch import BatchPlan
from bigbatch.launcher.cli.main import cli
from bigbatch.trainers.inference.augmented import draw, main
from bigbatch.trainers.job import training_batches
from bigbatch.trainers.models.build import build_augmenter
from bigbatch.trainers.planning.inputs import open_inputs

CPU = torch.device("cpu")
OPS = (
    "augment.ops=[{name: rotate, p: 0.5}, {name: pad_crop, padding: 2}, perspective, vertical_flip,"
    " {name: noise, p: 1}, equalize, randaugment, randaugment, augmix, {name: autoaugment, "
    "policy: svhn}, {name: erasing, p: 0.5, fill: noise}]"
)
SMALL = ("global_batch=24", "micro_batch=4", "data.image_size=16", "augment.border=reflect")


def arguments(digits: Path, out: Path, *more: str) -> list[str]:
    return ["--out", str(out), *more, "--", "digits", f"data.path={digits}", *SMALL, OPS]


def test_a_row_for_each_operation_by_its_draws(digits: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "grid.png"
    assert main(arguments(digits, out, "--images", "3", "--step", "2", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    geometry = ["affine", "rotate", "pad_crop", "perspective", "vertical_flip"]
    pixels = ["jitter", "noise", "equalize", "randaugment", "randaugment-2", "augmix"]
    last = ["autoaugment", "erasing", "mixup"]
    assert found["rows"] == ["evaluation", *geometry, *pixels, *last, "training"]
    picture = np.asarray(Image.open(out))
    assert picture.shape == (16 * (20 + 96), 3 * 96, 3)
    recipe = load_recipe("digits", [f"data.path={digits}", *SMALL, OPS])
    inputs = open_inputs(recipe)
    augmenter = build_augmenter(recipe, 10, CPU)
    plan = BatchPlan(24, 4, rank=0, world=6, start_step=2, stop_step=3)
    (batch,) = training_batches(recipe, inputs, plan, augmenter.view, CPU)
    images, _ = augmenter.train(batch)
    seen = (images * augmenter.std[0] + augmenter.mean[0])[:3]
    row = contact_sheet(seen, columns=3)[..., 0]
    last = picture[-96:, :, 0][3::6, 3::6]  # each pixel is drawn six times as large
    assert np.abs(last.astype(int) - row).max() <= 1


@pytest.mark.parametrize(
    ("out", "more", "says"),
    [
        ("grid.jpg", [], "the name must end in .png"),
        ("grid.png", ["--images", "5"], "has 4; give at most that"),
        ("no/folder/grid.png", ["--images", "2"], "cannot write"),
    ],
)
def test_what_cannot_be_drawn(digits: Path, tmp_path: Path, capfd, out, more, says) -> None:
    assert main(arguments(digits, tmp_path / out, *(more or ["--images", "2"]))) == 2
    assert says in capfd.readouterr().err


def test_names_stand_above_their_rows() -> None:
    row = np.full((8, 16, 3), 100, np.uint8)
    sheet = np.asarray(draw([("a", row), ("b", row[..., :1])]))
    assert sheet.shape == (2 * (20 + 96), 2 * 96, 3)
    for top in (0, 116):
        assert sheet[top : top + 20].min() < 60  # letters
        assert (sheet[top + 20 : top + 116] == 100).all()


def test_the_command_hands_all_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _, command: seen.extend(command))
    given = [
        "digits",
        "augment.mixup=0",
        "--out",
        "a.png",
        "--images",
        "4",
        "--step",
        "7",
        "--json",
    ]
    CliRunner().invoke(cli, ["augment", *given], catch_exceptions=False)
    module = ["-P", "-m", "bigbatch.trainers.inference.augmented"]
    options = ["--out", "a.png", "--images", "4", "--step", "7", "--json"]
    assert seen == [sys.executable, *module, *options, "--", "digits", "augment.mixup=0"]


def test_an_augmented_micro_batch_is_the_same_on_any_rank_and_from_any_worker(digits: Path) -> None:
    """And wherever a run begins: by (step, micro-batch) alone."""
    recipe = load_recipe("digits", [f"data.path={digits}", *SMALL, OPS])
    inputs = open_inputs(recipe)

    def augmented(world: int, workers: int, start: int = 0):
        data = recipe.data.model_copy(update={"workers": workers})
        one = recipe.model_copy(update={"data": data})
        found = {}
        for rank in range(world):
            plan = BatchPlan(24, 4, rank, world, start, 3)
            augmenter = build_augmenter(one, 10, CPU)
            for batch in training_batches(one, inputs, plan, augmenter.view, CPU):
                images, targets = augmenter.train(batch)
                found[batch.step, batch.index] = images.clone(), targets
        return found

    expected = augmented(world=1, workers=0)
    assert len(expected) == 18
    for other in (augmented(3, 0), augmented(2, 1, start=1)):
        assert len(other) in (18, 12)
        for place, (images, targets) in other.items():
            assert torch.equal(images, expected[place][0])
            assert torch.equal(targets, expected[place][1])
