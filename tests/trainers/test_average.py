"""The average of a run's weights, from its first step to a model of its own; real runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.prove import prove
from bigbatch.launcher.start import agent_command
from bigbatch.trainers import worker
from bigbatch.trainers.models.weights_file import read_header, read_info
from bigbatch.trainers.recovery.stored import AVERAGE, MODEL
from tests.helpers import warm

STEPS, BATCH, HALF_LIFE = 8, 32, 100
EMA = f"average={{name: ema, half_life: {HALF_LIFE} samples, start: 2 steps}}"
SWA = "average={name: swa, start: 2 steps, every: 3 steps}"


class Net(nn.Module):
    """A linear model behind BatchNorm, which its own first layer moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.frozen = nn.Linear(10, 10).requires_grad_(False)
        self.passes, self.bad_pass = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
        x = self.frozen(self.head(self.norm(self.first(x))))
        if self.training and torch.is_grad_enabled():
            self.passes += 1
            if self.passes == self.bad_pass:
                return x * math.inf
        return x


def start(
    folder: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, *changes: str, bad_pass: int = -1
) -> RunDir:
    """A run, with a checkpoint of every step; not yet trained."""

    def build(*_: Any, **__: Any) -> Net:
        net = Net()
        net.bad_pass = bad_pass
        return net

    monkeypatch.setattr("bigbatch.trainers.job.build_model", build)
    monkeypatch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])  # takes seconds
    settings = [
        *(f"data.path={digits}", "log.wandb=off", "data.workers=0", f"duration={STEPS} steps"),
        *(f"global_batch={BATCH}", "micro_batch=32", "schedule={name: constant}"),
        *("optimizer={name: sgd, lr: 0.05}", "clip=null", "ensemble.soup=false"),
        *("checkpoint={every: 1 steps, keep: 99}", "evaluate.every=100 steps", *changes),
    ]
    return create_run(folder / "run", load_recipe("digits", settings))


def train(run: RunDir, *options: str) -> None:
    assert worker.main([str(run.path), *options]) == 0


def saved(run: RunDir, step: int, name: str = MODEL) -> dict[str, Tensor]:
    return load_file(run.checkpoints / f"step-{step:08d}" / name)


def expected(run: RunDir, steps: list[int], decay: float) -> dict[str, Tensor]:
    """The average by its definition, from the checkpoint of every step."""
    path = [saved(run, step) for step in steps]
    parts = [decay ** (len(path) - i) for i in range(1, len(path) + 1)]
    trained = [n for n, _ in Net().named_parameters() if not n.startswith("frozen")]
    return {
        name: sum(part * at[name].double() for part, at in zip(parts, path, strict=True))
        / sum(parts)
        for name in trained
    }


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-13, atol=1e-14)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("average", "steps", "decay"),
    [
        pytest.param(EMA, [3, 4, 5, 6, 7, 8], 0.5 ** (BATCH / HALF_LIFE), id="ema"),
        pytest.param(SWA, [2, 5, 8], 1.0, id="swa", marks=pytest.mark.slow),
    ],
)
def test_a_run_s_average_is_that_of_its_checkpoints(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    average: str,
    steps: list[int],
    decay: float,
) -> None:
    run = start(tmp_path, digits, monkeypatch, average)
    train(run, "--stop-at", "5")
    train(run)  # goes on, by the checkpoint of step 5
    for number, step in enumerate(steps, start=1):
        assert_close(saved(run, step, AVERAGE), expected(run, steps[:number], decay))
    before = run.checkpoints / f"step-{steps[0] - 1:08d}"
    assert sorted(p.name for p in before.glob("*.safetensors")) == [MODEL, "optimizer.safetensors"]

    name = run.recipe().average.name
    kept = load_file(run.ensemble / f"{name}.safetensors")
    last, mean = saved(run, STEPS), saved(run, STEPS, AVERAGE)
    assert kept.keys() == last.keys()
    for key, value in kept.items():
        if key in mean:
            assert torch.equal(value, mean[key].float())
        elif key.startswith("frozen"):
            assert torch.equal(value, last[key])
    assert not torch.equal(kept["norm.running_mean"], last["norm.running_mean"])  # recomputed
    info = read_info(read_header(run.ensemble / f"{name}.safetensors"))
    assert info is not None
    assert len(info.classes) == 10
    summary = json.loads(run.summary.read_text())
    for split in ("val", "test"):
        assert summary[split][name].keys() == summary[split]["ensemble"].keys()
        assert summary[split][name] != summary[split]["ensemble"]


def test_a_rollback_takes_the_average_back_too(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is not finite in step 6: steps 5 and 6 make no update, of weights and average."""
    back = ("recovery.max_rollbacks=1", "recovery.skip_steps=2")
    run = start(tmp_path, digits, monkeypatch, EMA, *back, "duration=99 steps", bad_pass=7)
    train(run, "--stop-at", str(STEPS))
    (event,) = [e for e in read_jsonl(run.events) if e["kind"] == "rollback"]
    assert (event["first"], event["last"]) == (5, 6)
    decay = 0.5 ** (BATCH / HALF_LIFE)
    assert_close(saved(run, STEPS, AVERAGE), expected(run, [3, 4, 5, 8], decay))
    state = json.loads((run.checkpoints / f"step-{STEPS:08d}" / "state.json").read_text())
    assert state["averaged"] == 4


@pytest.mark.slow
def test_an_average_that_every_step_passed_over_is_said_to_be_missing(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    late = f"average={{name: swa, start: {STEPS - 1} steps, every: 1 steps}}"
    back = ("recovery.max_rollbacks=1", "recovery.skip_steps=2")
    run = start(tmp_path, digits, monkeypatch, late, *back, bad_pass=STEPS)
    train(run)
    said = "there is no swa: each step that counts for it was skipped"
    assert said in capfd.readouterr().out
    assert said in [e.get("error") for e in read_jsonl(run.events)]
    assert "swa" not in json.loads(run.summary.read_text())["val"]
    assert not (run.ensemble / "swa.safetensors").exists()


def test_another_average_is_another_run(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = start(tmp_path, digits, monkeypatch)
    train(run, "--stop-at", "3")
    text = run.recipe_file.read_text().replace("average: null", SWA.replace("=", ": "))
    run.recipe_file.write_text(text)
    assert worker.main([str(run.path)]) == 2
    assert "average = null there" in capfd.readouterr().err


def full_run(folder: Path, digits: Path, ranks: int, *changes: str) -> dict[str, Tensor]:
    """The averaged model of a whole short run of the digits, in processes of its own."""
    settings = [
        *(f"data.path={digits}", "log.wandb=off", "data.workers=0", "duration=5 steps"),
        *("global_batch=64", "micro_batch=16", "schedule={name: constant}", "clip=null"),
        *("optimizer={name: sgd, lr: 0.01}", "average={name: ema, half_life: 100 samples}"),
    ]
    run = create_run(folder, load_recipe("digits", [*settings, *changes]))
    assert warm.run(agent_command(run.path, ranks, stop_at=5), timeout=280).returncode == 0
    assert "ema" in json.loads(run.summary.read_text())["test"]
    return load_file(run.ensemble / "ema.safetensors")


@pytest.mark.slow
def test_the_averaged_model_is_the_same_on_any_ranks_and_backend(
    digits: Path, tmp_path: Path
) -> None:
    """Bit for bit where the reduction is exact, running statistics included; else to rounding."""
    alone = full_run(tmp_path / "alone", digits, 1)
    for name, value in full_run(tmp_path / "three", digits, 3).items():
        assert torch.equal(value, alone[name]), name
    for backend in ("zero2", "fsdp2"):
        changes = f"backend={backend}", "reduction=overlapped"
        found = full_run(tmp_path / backend, digits, 2, *changes)
        assert found.keys() == alone.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_averages_are_proven_and_do_not_depend_on_the_world_size(
    digits: Path, tmp_path: Path
) -> None:
    """reduction: exact, which digits has: bit for bit on 1, 2 and 3 ranks, killed and resumed."""
    changes = [f"data.path={digits}", "global_batch=64", "micro_batch=16"]
    recipe = load_recipe("digits", [*changes, "average={name: ema, half_life: 150 samples}"])
    results = prove(recipe, tmp_path / "proof", steps=6, ranks=[1, 2, 3], seed=0)
    assert all(result.passed for result in results), results
    files = [
        path / AVERAGE for path in sorted((tmp_path / "proof").glob("*/checkpoints/step-00000006"))
    ]
    assert len(files) == 4
    assert len({file.read_bytes() for file in files}) == 1
