"""A trunk, its workers and their average as one run: the same as each part by hand."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import change_recipe, load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.index import open_index
from bigbatch.launcher import members
from bigbatch.launcher.child import kill_tree, steps_done
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.fork import find_checkpoint, make_branches, plan_branch
from bigbatch.launcher.phases import plan_workers, train_phases
from bigbatch.trainers import worker
from bigbatch.trainers.engine import open_engine
from bigbatch.trainers.ensemble.members import find_members
from bigbatch.trainers.evaluation.by_sample import read_outcomes
from bigbatch.trainers.evaluation.record import read_evaluation
from bigbatch.trainers.inference.soup import look_alone, make_soup
from bigbatch.trainers.planning.inputs import fit, open_inputs
from bigbatch.trainers.planning.swap import unfinished, worker_runs
from bigbatch.trainers.recovery.signals import SAVED
from bigbatch.trainers.report.results import result_rows
from tests.helpers import warm
from tests.helpers.warm import bigbatch, popen

SMALL = (
    "model={name: test_resnet, options: {drop_rate: 0.2}}",
    "data={workers: 0, threads: 1, image_size: 16}",
    "log.wandb=off",
    "log.tensorboard=false",
    "duration=3 steps",
    "global_batch=64",
    "micro_batch=32",
    "schedule={name: constant, warmup: 0 steps}",
    "optimizer={name: sgd, lr: 0.1, momentum: 0.9}",
    "checkpoint={every: 100 steps, keep: 9}",
    "evaluate.precise_bn_images=96",
)
SWAP = "phases={name: swap, workers: 2, duration: 4 steps, global_batch: 32, lr: 0.02}"


def small(digits: Path, *changes: str) -> Any:
    return load_recipe("digits", [f"data.path={digits}", *SMALL, *changes], say=None)


class InThisProcess:
    """In place of `Children`: each run trains here, at once; those in `stops` to that step."""

    stops: ClassVar[dict[str, int]] = {}
    started: ClassVar[list[str]] = []

    def __init__(self, nproc: int, threads: int | None, *, to_the_end: bool) -> None:
        assert (nproc, to_the_end) == (1, True)

    def start(self, run: RunDir, gpus: list[str]) -> "InThisProcess":
        self.run = run
        self.started.append(run.name)
        stop = self.stops.pop(run.name, None)
        more = [] if stop is None else ["--stop-at", str(stop)]
        self.status = worker.main([str(run.path), *more]) or (SAVED if more else 0)
        return self

    def poll(self) -> int:
        return self.status

    wait = poll

    def stop(self) -> None: ...

    close = stop


@pytest.fixture(scope="module")
def here() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(members, "Children", InThisProcess)
        patch.setattr(members, "_POLL_S", 0.0)
        patch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])  # takes seconds
        yield patch


@pytest.fixture(scope="module")
def swapped(
    digits: Path, tmp_path_factory: pytest.TempPathFactory, here: pytest.MonkeyPatch
) -> RunDir:
    """A run with phases, stopped in its trunk and in its second worker, and gone on with."""
    run = create_run(tmp_path_factory.mktemp("runs") / "swap", small(digits, SWAP))
    said: list[str] = []
    for name, stop in (("swap", 2), ("swap-worker-1", 8)):
        InThisProcess.stops = {name: stop}
        assert train_phases(run, 1, 1, said.append) == SAVED
        assert said[-1] == f"stopped and saved; bigbatch resume {run.path} goes on"
        assert not run.summary.exists()
    assert len(unfinished(run, run.recipe())) == 1
    InThisProcess.started.clear()
    assert train_phases(run, 1, 1, said.append) == 0
    assert InThisProcess.started == ["swap-worker-1", "swap"]
    for path in (run.path, run.path / ".." / run.name):
        assert not unfinished(RunDir(path), run.recipe())
    return run


def by_hand(trunk: RunDir, folder: Path, *changes: str) -> list[RunDir]:
    """What `bigbatch fork TRUNK --members 2 CHANGES` makes and trains."""
    recipe = change_recipe(trunk.recipe(), ["phases=null", *changes], say=None)
    checkpoint = find_checkpoint(trunk, None)
    branches = [
        plan_branch(trunk, checkpoint, folder / f"hand-{k}", own)
        for k, own in enumerate(members.member_recipes(recipe, 2))
    ]
    runs = make_branches(trunk, checkpoint, branches)
    assert [worker.main([str(run.path)]) for run in runs] == [0, 0]
    return runs


def end_of(run: RunDir, step: int) -> dict[str, bytes]:
    folders = run.checkpoints / f"step-{step:08}", *sorted(run.snapshots.iterdir())
    return {f"{f.name}/{p.name}": p.read_bytes() for f in folders for p in f.glob("*.safetensors")}


def test_a_run_that_was_stopped_keeps_the_mean_of_its_workers(swapped: RunDir) -> None:
    runs = worker_runs(swapped, swapped.recipe())
    each = [load_file(find_members(run)[0].weights) for run in runs]
    (average,) = find_members(swapped)  # what evaluate, predict and export take
    assert average.name == "swap/swap"
    for key, value in load_file(average.weights).items():
        mean = torch.stack([weights[key].double() for weights in each]).mean(0)
        if "running" in key:
            assert not torch.allclose(value, mean.float())
        elif value.is_floating_point():
            assert torch.equal(value, mean.float())
    summary = json.loads(swapped.summary.read_bytes())
    assert summary["steps"] == 3
    assert {"members", "swap"} <= summary["val"].keys() & summary["test"].keys()
    names = [member["name"] for member in summary["phases"]["members"]]
    assert names == ["swap-worker-0/cycle-01", "swap-worker-1/cycle-01"]
    assert [name for name, *_ in result_rows(summary)] == ["cycle-01", "swap"]
    # What `bigbatch diff` compares, and the report shows, is of what the run keeps.
    assert summary["val"]["swap"]["nll"] != summary["val"]["ensemble"]["nll"]
    for split in ("val", "test"):
        written = read_evaluation(swapped.evaluations / split)
        assert (written["member_names"], written["notes"]) == (["swap/swap"], [])
        own = read_outcomes(swapped.evaluations / split, written["outcomes_sha256"])
        assert written["nll"] == own.losses.mean() == summary[split]["swap"]["nll"]
    confusion = json.loads((swapped.ensemble / "confusion.json").read_bytes())
    right = sum(row[2] for row in confusion["pairs"] if row[0] == row[1])
    assert right == round(summary["test"]["swap"]["accuracy"] * len(own))


@pytest.mark.slow
def test_each_part_is_what_a_person_gets_by_hand(
    swapped: RunDir, digits: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    trunk = create_run(tmp_path / "trunk", small(digits))
    assert worker.main([str(trunk.path)]) == 0
    assert end_of(trunk, 3) == end_of(swapped, 3)
    # 3 steps of 64 samples are 6 of 32, and 4 more of those make 320 samples.
    pieces = "[{length: 6 steps, schedule: constant}, {schedule: cosine}]"
    changes = ["global_batch=32", "duration=10 steps", "optimizer.lr=0.02"]
    changes += [f"schedule={{name: sequence, pieces: {pieces}}}"]
    hands = by_hand(trunk, tmp_path, *changes)
    for hand, own in zip(hands, worker_runs(swapped, swapped.recipe()), strict=True):
        assert end_of(hand, 10) == end_of(own, 10)
    assert end_of(hands[0], 10) != end_of(hands[1], 10)
    engine = open_engine("ddp", "fp32", "exact")
    try:
        ingredients = [member for run in hands for member in find_members(run)]
        soup, record = make_soup(
            engine, ingredients, "uniform", open_index(digits / "val"), tmp_path
        )
        splits = {role: open_index(digits / role) for role in ("val", "test")}
        seen = look_alone(engine, soup, splits)
    finally:
        engine.close()
    (average,) = find_members(swapped)
    assert average.weights.read_bytes() == soup.weights.read_bytes()
    summary = json.loads(swapped.summary.read_bytes())
    for role, found in seen.items():
        assert found is not None
        assert summary[role]["swap"] == found.members[0].scores()
    assert [b["losses"] for b in summary["phases"]["barriers"]] == [
        list(b["losses"]) for b in record["barriers"]
    ]


def test_a_branch_of_a_trunk_has_no_workers(swapped: RunDir, tmp_path: Path) -> None:
    arguments = ["fork", str(swapped.path), "--no-train", "--run-dir", str(tmp_path / "b")]
    longer = "duration=9 steps"
    done = CliRunner().invoke(cli, [*arguments, longer], catch_exceptions=False)
    assert done.exit_code == 0
    assert RunDir(tmp_path / "b").recipe().phases is None
    with pytest.raises(UserError, match="phases follow a run that `bigbatch train` starts"):
        CliRunner().invoke(cli, [*arguments, longer, SWAP], catch_exceptions=False)


@pytest.mark.parametrize("trunk", ["3 steps", "1.5 epochs", "1000 samples"])
def test_a_worker_begins_at_the_trunk_s_sample_with_a_schedule_of_its_own(
    digits: Path, trunk: str
) -> None:
    own = ["phases.workers=3", "phases.duration=2 epochs", "phases.micro_batch=16"]
    recipe = small(digits, SWAP, *own, f"duration={trunk}", "seed=5")
    found = plan_workers(recipe)
    assert found is not None
    assert [each.seed for each in found.recipes] == [5, 6, 7]
    first = found.recipes[0]
    assert (first.global_batch, first.micro_batch, first.optimizer.lr) == (32, 16, 0.02)
    assert first.phases is None
    epoch = open_inputs(recipe).epoch_samples
    assert found.start * 32 == found.trunk * 64
    steps = math.ceil(2 * epoch / 32)
    assert found.total - found.start == steps
    plan, rate = fit(first, epoch)
    assert plan.total == found.total
    for k in (0, 1, steps // 2, steps - 1):
        expected = 0.5 * (1 + math.cos(math.pi * k / steps))
        assert rate(found.start + k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (["global_batch=192"], "576 samples, no whole number of steps of global_batch 128"),
        (
            [
                *("average={name: swa, start: 0 steps, every: cycle}", "global_batch=128"),
                "schedule={name: cycles, cycles: 2, warmup: 0 steps, rewarmup: 0 steps}",
            ],
            "average.every: cycle needs the schedule cycles, not sequence",
        ),
    ],
)
def test_workers_that_cannot_go_on_are_refused_before_the_trunk(
    digits: Path, tmp_path: Path, changes: list[str], error: str
) -> None:
    given = [*SMALL, SWAP, "phases.global_batch=128", *changes]
    arguments = ["train", "digits", f"data.path={digits}", *given]
    with pytest.raises(UserError, match=f"(?s)a worker cannot go on from the trunk: .*{error}"):
        CliRunner().invoke(
            cli, [*arguments, "--run-dir", str(tmp_path / "r")], catch_exceptions=False
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "options", "error"),
    [
        ("train", ["--members", "2"], "--members 2: a recipe with phases trains workers by itself"),
        ("train", ["--launcher", "accelerate"], "starts its trunk and its workers itself"),
        ("submit", [], "a job of `submit` is one run, .* submit the trunk with phases=null"),
        ("tune", [], "a trial is one run, and would be the trunk alone"),
    ],
)
def test_what_would_pass_over_the_workers_is_refused(
    digits: Path, tmp_path: Path, command: str, options: list[str], error: str
) -> None:
    arguments = [command, "digits", f"data.path={digits}", *SMALL, SWAP, *options]
    if command == "tune":
        space = tmp_path / "space.yaml"
        space.write_text("space: {optimizer.lr: {values: [0.1, 0.2]}}\n")
        arguments.insert(2, str(space))
    else:
        arguments += ["--run-dir", str(tmp_path / "r")]
    with pytest.raises(UserError, match=error):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert not (tmp_path / "r").exists()


def test_a_taken_place_is_refused_before_anything_is_made(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "r-worker-1").mkdir()
    arguments = ["train", "digits", f"data.path={digits}", *SMALL, SWAP]
    with pytest.raises(UserError, match="r-worker-1 is there, where a worker of r goes; remove it"):
        CliRunner().invoke(
            cli, [*arguments, "--run-dir", str(tmp_path / "r")], catch_exceptions=False
        )
    assert not (tmp_path / "r").exists()
    # One that is another run's is no worker, finished or not.
    run = create_run(tmp_path / "s", small(digits, SWAP))
    other = create_run(tmp_path / "s-worker-0", small(digits))
    other.summary.write_text("{}")
    assert len(unfinished(run, run.recipe())) == 2
    taken = "s-worker-0 exists and is another run, or branched off elsewhere; put s and its workers"
    with pytest.raises(UserError, match=taken):
        train_phases(run, 1, 1)
    assert not run.checkpoints.exists()


def test_check_says_what_follows(digits: Path) -> None:
    arguments = ["check", "digits", f"data.path={digits}", *SMALL, SWAP, "--quick", "--json"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert json.loads(done.stdout)["phases"] == (
        "swap: behind step 3 2 workers of 4 steps of 32 samples each, on up to 1 rank, and the "
        "average of their weights"
    )


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_average(
    swapped: RunDir, digits: Path, tmp_path: Path
) -> None:
    """The command line, in processes: two ranks for the trunk, its workers side by side."""
    where = ["--runs", tmp_path, "--nproc", "2", "--at-once", "2"]
    given = [f"data.path={digits}", *SMALL, SWAP, "log.diagnosis=false"]
    started = popen(bigbatch("train", "digits", *given, "--run", "swap", *where))
    run, deadline = RunDir(tmp_path / "swap"), time.monotonic() + 300
    while not all(steps_done(own) for own in worker_runs(run, small(digits, SWAP))):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_tree(started.pid)
    started.wait()
    assert not run.summary.exists()
    done = warm.run(bigbatch("resume", "swap", *where), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "swap" in done.stdout
    average = "ensemble/swap.safetensors"
    assert (run.path / average).read_bytes() == (swapped.path / average).read_bytes()
    again = warm.run(bigbatch("resume", "swap", *where), capture_output=True)
    assert (again.returncode, "is finished; see" in again.stdout) == (0, True)
