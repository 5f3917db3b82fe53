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
    *(
        "global_batch=32",
        "reduction=overlapped",
        "duration=10 epochs",
        "loss.label_smoothing=0",
        "log.wandb=off",
    ),
    *("optimizer={name: sgd, lr: 0.05}", "schedule={name: cosine}"),
    *("augment=null", "augment={mean: [0.3], std: [0.38]}", "evaluate.every=2 epochs"),
    "evaluate.precise_bn_images=128",
)


def write(root: Path, train: np.ndarray, labels: np.ndarray, val_labels: np.ndarray) -> None:
    """Digits as shards: those of `train` with `labels`, and the last 240 with `val_labels`.

    Other people wrote the last ones: networks get 90 to 95 % of them right.
    """
    images = load_digits().images

    def pairs(numbers: np.ndarray, classes: np.ndarray) -> list[tuple[bytes, int]]:
        found = []
        for number, label in zip(numbers, classes, strict=True):
            file = io.BytesIO()
            Image.fromarray((images[number] * 255 / 16).astype(np.uint8)).save(file, "PNG")
            found.append((file.getvalue(), int(label)))
        return found

    write_shards(root / "train", pairs(train, labels), 2000)
    write_shards(root / "val", pairs(np.arange(1557, 1797), val_labels), 2000)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, whole and damaged: few, noisy, with a class that is rare, with other val labels."""
    place, target = tmp_path_factory.mktemp("digits"), load_digits().target
    rng = np.random.default_rng(0)
    every, few, val = np.arange(400), np.arange(160), target[1557:]
    write(place / "whole", every, target[every], val)
    noisy = np.where(rng.random(160) < 0.4, rng.integers(0, 10, 160), target[few])
    write(place / "noisy", few, noisy, val)
    rare = np.concatenate([every[target[every] != 8], every[target[every] == 8][:3]])
    write(place / "rare", rare, target[rare], val)
    write(place / "other", every, target[every], (val + 3) % 10)
    return place


PLAIN = "model={name: 'tests.helpers.nets:convolutions', options: {norm: false}"
DEEP = PLAIN.replace("{norm", "{depth: 12, width: 16, norm")
MIXED = "augment={mean: [0.3], std: [0.38], mixup: 0.2, affine: {degrees: 10, translate: 0.1}}"
BROKEN = {
    "diverged": ("whole", ("optimizer.lr=10", "duration=6 epochs")),
    "plateau": (
        "whole",
        (
            "optimizer={name: sgd, lr: 0.3, weight_decay: 0.03}",
            *("schedule={name: constant}", "model.options={width: 8}", MIXED),
        ),
    ),
    "too_slow": ("whole", ("optimizer.lr=1e-4",)),
    "underfitting": ("whole", ("model={name: 'tests.helpers.nets:coarse'}", "optimizer.lr=0.3")),
    "overfitting": ("noisy", ("model.options={width: 64}", "duration=24 epochs")),
    "dead": ("whole", (PLAIN + ", init: {bias: -8}}", "duration=6 epochs")),
    "vanishing": ("whole", (DEEP + ", activation: Sigmoid}", "duration=4 epochs")),
    "exploding": ("whole", (DEEP + ", init: {weights: {name: normal, std: 0.4}}}",)),
    "starved": ("rare", ()),
    "mismatch": ("other", ("duration=8 epochs",)),
}
# Others of the same kinds, for which no rule was changed.
MORE = {
    "diverged": ("whole", ("optimizer={name: adamw, lr: 3}", "seed=11", "duration=6 epochs")),
    "underfitting": (
        "whole",
        (
            "model={name: 'tests.helpers.nets:coarse'}",
            *("optimizer={name: adamw, lr: 0.03}", "seed=12", MIXED, "duration=20 epochs"),
        ),
    ),
    "overfitting": (
        "noisy",
        (
            PLAIN.replace("{norm", "{depth: 3, width: 48, norm") + "}",
            *("optimizer={name: adamw, lr: 0.003}", "seed=13", "duration=24 epochs"),
        ),
    ),
}
HEALTHY = {
    "plain": (),
    "adamw": (
        *("optimizer={name: adamw, lr: 0.005, weight_decay: 0.05}", "loss={label_smoothing: 0.1}"),
        MIXED,
    ),
    "lars": (
        *("optimizer={name: lars, lr: 1, trust_coefficient: 0.005}", "global_batch=64"),
        *("schedule={name: cycles, cycles: 2, warmup: 1 epochs}", "data.sampling=balanced"),
        *("loss.label_smoothing=0.1", MIXED),
    ),
    "lamb": (
        *("optimizer={name: lamb, lr: 0.02, weight_decay: 0.01}", "model.options={depth: 3}"),
        *("seed=14", "augment.cutmix=0.5"),
    ),
}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its charts take as long as some of these runs."""
    monkeypatch.setattr(
        "bigbatch.trainers.report.report.write_report", lambda run, summary: run.path
    )


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


CASES = [*BROKEN.items(), *MORE.items()]


@pytest.mark.parametrize(("rule", "case"), CASES, ids=[*BROKEN, *(f"{r}-again" for r in MORE)])
def test_a_broken_run_is_named(
    tmp_path: Path, shards: Path, rule: str, case: tuple[str, tuple[str, ...]]
) -> None:
    data, changes = case
    found = rules(tmp_path, shards / data, changes)
    problems = [name for name, level in found.items() if level == "problem"]
    assert problems[0] == rule
    assert set(problems) <= {rule, "non_finite"}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_not_blamed(tmp_path: Path, shards: Path, name: str) -> None:
    found = rules(tmp_path, shards / "whole", HEALTHY[name])
    assert "problem" not in found.values()
