"""Real small runs, each broken in its own way, are named rightly; no healthy one is blamed."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from bigbatch.configs.load import change_recipe, load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.trainers import worker
from bigbatch.trainers.monitoring.history import read_history
from bigbatch.trainers.report.diagnosis import learning
from tests.helpers.micro_batches import write_shards

pytestmark = pytest.mark.slow
SMALL = (
    *("model={name: 'tests.helpers.nets:convolutions'}", "data.image_size=8", "data.workers=0"),
    *("data.threads=1", "data.test=null", "data.sampling=uniform", "micro_batch=32"),
    *("global_batch=32", "reduction=overlapped", "duration=12 epochs", "loss={}", "log.wandb=off"),
    *("optimizer={name: sgd, lr: 0.05, momentum: 0.9}", "schedule={name: cosine}"),
    *("augment={mean: [0.3], std: [0.38]}", "evaluate.every=1 epochs"),
)


def write(root: Path, train: np.ndarray, labels: np.ndarray, val_labels: np.ndarray) -> None:
    """Digits as shards: those of `train` with `labels`, and the last 360 with `val_labels`."""
    images = load_digits().images

    def pairs(numbers: np.ndarray, classes: np.ndarray) -> list[tuple[bytes, int]]:
        found = []
        for number, label in zip(numbers, classes, strict=True):
            file = io.BytesIO()
            Image.fromarray((images[number] * 255 / 16).astype(np.uint8)).save(file, "PNG")
            found.append((file.getvalue(), int(label)))
        return found

    write_shards(root / "train", pairs(train, labels), 2000)
    write_shards(root / "val", pairs(np.arange(1437, 1797), val_labels), 2000)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, whole and damaged: few, noisy, with a class that is rare, with other val labels."""
    place, target = tmp_path_factory.mktemp("digits"), load_digits().target
    rng = np.random.default_rng(0)
    every, val = np.arange(640), target[1437:]
    write(place / "whole", every, target[every], val)
    noisy = np.where(rng.random(640) < 0.4, rng.integers(0, 10, 640), target[every])
    write(place / "noisy", every, noisy, val)
    rare = np.concatenate([every[target[every] != 8], every[target[every] == 8][:3]])
    write(place / "rare", rare, target[rare], val)
    write(place / "other", every, target[every], (val + 3) % 10)
    return place


PLAIN = "model={name: 'tests.helpers.nets:convolutions', options: {norm: false}"
DEEP = PLAIN.replace("{norm", "{depth: 12, width: 16, norm")
BROKEN = {
    "diverged": ("whole", ("optimizer.lr=10",)),
    "plateau": (
        "whole",
        (
            "optimizer={name: sgd, lr: 0.3, momentum: 0.9, weight_decay: 0.03}",
            *("schedule={name: constant}", "model.options={width: 8}"),
        ),
    ),
    "too_slow": ("whole", ("optimizer.lr=1e-4",)),
    "underfitting": ("whole", ("model={name: 'tests.helpers.nets:coarse'}", "optimizer.lr=0.3")),
    "overfitting": ("noisy", ("model.options={width: 64}", "duration=24 epochs")),
    "dead": ("whole", (PLAIN + ", init: {bias: -8}}", "duration=6 epochs")),
    "vanishing": ("whole", (DEEP + ", activation: Sigmoid}", "duration=4 epochs")),
    "exploding": ("whole", (DEEP + ", init: {weights: {name: normal, std: 0.4}}}",)),
    "starved": ("rare", ()),
    "mismatch": ("other", ()),
}
HEALTHY = {
    "plain": (),
    "adamw": (
        *("optimizer={name: adamw, lr: 0.005, weight_decay: 0.05}", "loss={label_smoothing: 0.1}"),
        *("augment={mean: [0.3], std: [0.38], mixup: 0.2, affine: {degrees: 10, translate: 0.1}}",),
    ),
    "lars": (
        *("optimizer={name: lars, lr: 2, trust_coefficient: 0.005}", "global_batch=64"),
        *("schedule={name: cycles, cycles: 2, warmup: 1 epochs}", "data.sampling=balanced"),
    ),
}


def rules(tmp_path: Path, data: Path, changes: Sequence[str]) -> dict[str, str]:
    """Level by rule, of a run of the small recipe with `changes`."""
    recipe = load_recipe("digits", [f"data.path={data}"])
    recipe = change_recipe(recipe, [*SMALL, *changes], say=None)
    run = create_run(tmp_path / "run", recipe)
    worker.main([str(run.path)])
    found = learning(read_history(run))
    for finding in found:
        print(finding.rule, finding.level, finding.text, finding.turn)
        if finding.turn is not None:  # what is advised can be done
            change_recipe(recipe, [str(finding.turn)], say=None)
    return {f.rule: f.level for f in found}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_run_is_named(tmp_path: Path, shards: Path, rule: str) -> None:
    data, changes = BROKEN[rule]
    found = rules(tmp_path, shards / data, changes)
    problems = [name for name, level in found.items() if level == "problem"]
    assert problems[0] == rule
    assert set(problems) <= {rule, "non_finite"}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_not_blamed(tmp_path: Path, shards: Path, name: str) -> None:
    found = rules(tmp_path, shards / "whole", HEALTHY[name])
    assert "problem" not in found.values()
