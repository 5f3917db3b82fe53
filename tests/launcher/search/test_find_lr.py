"""`bigbatch find-lr`: a sweep of real runs, which leaves nothing behind but its answer."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.search.find_lr import overrides, sweep_recipe
from bigbatch.trainers.planning.inputs import fit


def test_the_sweep_is_the_recipe_under_another_schedule() -> None:
    recipe = load_recipe("digits", ["optimizer.scale={rule: linear, base_batch: 128}"])
    sweep = sweep_recipe(recipe, 1e-3, 10.0, 50)
    plan, factor = fit(sweep, 1078)
    rates = [sweep.optimizer.lr * factor(step) / recipe.lr_scale for step in range(50)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[-1] == 10.0
    ratio = (10.0 / 1e-3) ** (1 / 49)
    assert [b / a for a, b in pairwise(rates)] == pytest.approx([ratio] * 49)
    assert plan.total == 51
    assert not any(plan.evaluates(step) or step in plan.snapshots for step in range(1, 51))
    same = ("data", "model", "augment", "global_batch", "micro_batch", "loss", "seed")
    assert all(getattr(sweep, part) == getattr(recipe, part) for part in same)


def test_an_average_that_starts_after_the_sweep_is_no_obstacle() -> None:
    recipe = load_recipe("digits", ["average={name: swa, start: 50 epochs}"])
    plan, _ = fit(sweep_recipe(recipe, 1e-3, 10.0, 50), 1078)
    assert plan.average is not None  # it takes the memory that the run would take


def test_muons_second_rate_keeps_its_ratio() -> None:
    muon = "optimizer={name: muon, lr: 0.02, rest: {name: lamb, lr: 0.001}}"
    recipe = load_recipe("digits", [muon])
    assert sweep_recipe(recipe, 0.01, 0.2, 50).optimizer.rest.lr == pytest.approx(0.01)  # type: ignore[union-attr]
    assert overrides(recipe, 0.04) == ["optimizer.lr=0.04", "optimizer.rest.lr=0.002"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--from", "2", "--to", "1"], "--from 2"),
        (["--from", "0"], "--from 0"),
        (["--to", "inf"], "below --to inf"),
        (["--from", "1e-320", "--to", "1e300"], "their ratio a number"),
        (["--steps", "5"], "--steps 5"),
        (["--plot", "lr.txt"], "--plot lr.txt"),
        (["--nproc", "9"], "9 ranks"),
        (["optimizer.lr=0"], "optimizer.lr"),
    ],
)
def test_mistakes(shards: str, options: list[str], says: str, monkeypatch) -> None:
    monkeypatch.chdir(shards)
    with pytest.raises(UserError, match=says):
        CliRunner().invoke(cli, ["find-lr", "digits", *options], catch_exceptions=False)


@pytest.mark.slow
def test_a_sweep_on_two_ranks_stops_where_the_loss_explodes(shards: str, tmp_path: Path) -> None:
    adamw = ["optimizer={name: adamw, lr: 0.01}", "global_batch=128", "data.image_size=16"]
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "find-lr", "digits", *adamw]
    command += ["--nproc", "2", "--steps", "60", "--from", "1e-5", "--to", "1e3", "--json"]
    command += ["--plot", str(tmp_path / "lr.png")]
    before = sorted(Path(shards).iterdir())
    done = subprocess.run(command, cwd=shards, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["diverged"]
    assert len(found["lr"]) < 60
    assert found["lr"] == sorted(found["lr"])
    assert 1e-4 < found["steepest"] < 10
    assert found["overrides"] == [f"optimizer.lr={found['steepest']:.3g}"]
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(Path(shards).iterdir()) == before
