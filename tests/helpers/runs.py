"""Runs with weights that nobody trained, which is enough to use them; and one that goes back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bigbatch.configs.load import load_recipe
from bigbatch.configs.recovery import Recovery
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.trainers.ensemble.members import save_snapshot
from bigbatch.trainers.models.build import build_model
from bigbatch.trainers.models.weights_file import describe
from bigbatch.trainers.recovery.rollback import Rollback, check_step

SMALL = ("model.name=test_resnet", "data.workers=0", "data.threads=1", "evaluate.batch=64")


def untrained_run(
    path: Path,
    data: Path,
    classes: Sequence[str],
    overrides: Sequence[str] = (),
    snapshots: int = 2,
    seed: int = 0,
) -> RunDir:
    """A run of the digits recipe, a small network in it, with snapshots of random weights."""
    recipe = load_recipe("digits", [f"data.path={data}", *SMALL, *overrides])
    run = create_run(path, recipe)
    for number in range(1, snapshots + 1):
        model = build_model(
            recipe.model,
            classes=len(classes),
            channels=recipe.data.channels,
            seed=100 * seed + number,
        )
        with torch.no_grad():  # BatchNorm's are alike in every fresh network
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(generator=torch.Generator().manual_seed(number))
        save_snapshot(run.snapshots, number, 10 * number, model, {}, describe(recipe, classes))
    return run


def go_back_once(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let a run in this process find the step after `step` finished ones wrong, the first time."""
    wrong = [step]

    def check(recovery: Recovery, at: int, *values: float, **more: Any) -> bool:
        if at in wrong:
            wrong.remove(at)
            raise Rollback("of a test", [at, at], *values[:2])
        return check_step(recovery, at, *values, **more)

    monkeypatch.setattr("bigbatch.trainers.loop.check_step", check)
