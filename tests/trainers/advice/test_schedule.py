"""A proposed batch schedule, from runs whose noise is known."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe, parse_recipe, read_yaml
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.preflight import check
from bigbatch.trainers.advice.advise import BATCHES_TRIED, Cluster, advise_run
from bigbatch.trainers.advice.schedule import ScheduleAdvice, advise_schedule
from bigbatch.trainers.planning.inputs import open_inputs

NOISE, SIGNALS = 900.0, (9.0, 1.0, 0.05)  # critical batches of 100, 900 and 18,000
STEP_S, PARAMETERS, EPOCH = 0.2, 25_000_000, 8192


def make_run(folder: Path, digits: Path, *changes: str, steps: int = 1800) -> RunDir:
    """A run of micro-batches of 64 at 256, one noise scale in each third; no draw is by chance."""
    settings = ["duration=450 epochs", "schedule={name: cosine, warmup: 20 steps}"]
    settings += [f"data.path={digits}", "micro_batch=64", "reduction=overlapped"]
    run = create_run(folder, load_recipe("digits", [*settings, *changes], say=None))
    with run.metrics.open("w") as file:
        for step in range(1, steps + 1):
            signal = SIGNALS[(step - 1) * 3 // steps]
            wave = 1 + 0.001 * math.sin(step)
            record = {"kind": "train", "step": step, "epoch": 256 * step / EPOCH, "lr": 1.0}
            record |= {"grad_sq_micro": (signal + NOISE / 64) * wave, "step_s": STEP_S}
            record |= {"grad_norm": math.sqrt((signal + NOISE / 256) * wave)}
            print(json.dumps(record), file=file)
    event = {"kind": "start", "step": 0, "world_size": 2, "total_steps": steps}
    run.events.write_text(json.dumps(event) + "\n")
    return run


def proposed(run: RunDir, gpus: int, bandwidth: float = 1e9) -> ScheduleAdvice:
    found = advise_run(run, Cluster(bandwidth, 0.0), parameters=PARAMETERS)
    return advise_schedule(found, run.recipe(), gpus)


def test_each_phase_has_the_batch_of_the_least_time(digits: Path, tmp_path: Path) -> None:
    """Independent: seconds of each batch by hand, from the truth that the records were made of."""
    run = make_run(tmp_path / "run", digits)
    plan = proposed(run, 4)
    exchange = 2 * 3 / 4 * PARAMETERS * 4 / 1e9  # of four GPUs; of two, less is hidden
    micro = (STEP_S - 2 * 1 / 2 * PARAMETERS * 4 / 1e9) / (2 - 2 / 3)
    stages: list[list[float]] = []
    for signal in SIGNALS:
        critical, taken = NOISE / signal, 600 * 256
        costs = {}
        for turns in BATCHES_TRIED:
            batch = 64 * 4 * turns
            samples = taken * (1 + batch / critical) / (1 + 256 / critical)
            step_s = turns * micro + max(0.0, exchange - 2 / 3 * micro)
            costs[batch] = (samples / batch * step_s, samples, step_s)
        best = min(costs, key=lambda batch: costs[batch][0])
        stages.append([best, costs[best][1], costs[best][2]])
    assert stages[0][0] < stages[1][0] < stages[2][0]
    assert [s.batch for s in plan.stages] == [best for best, *_ in stages]
    for stage, (batch, samples, step_s) in zip(plan.stages, stages, strict=True):
        assert stage.samples == pytest.approx(samples, rel=0.02, abs=batch)
        assert stage.step_s == pytest.approx(step_s, rel=1e-6)
        assert stage.steps * stage.batch == stage.samples
    assert plan.seconds < plan.constant.seconds
    assert plan.steps < plan.constant.steps


def test_the_recipe_is_one_that_trains_what_was_predicted(digits: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", digits, "optimizer.scale={rule: linear, base_batch: 128}")
    plan = proposed(run, 4)
    inputs = open_inputs(plan.recipe)
    assert inputs.plan.total == plan.steps
    assert inputs.plan.timeline.batches == tuple(stage.batch for stage in plan.stages)
    ends = [sum(s.steps for s in plan.stages[:i]) for i in range(len(plan.stages))]
    assert list(inputs.plan.timeline.starts) == ends
    assert str(plan.recipe.schedule.warmup) == "5120 samples"  # 20 steps of 256
    # LARS by the square root, from 4 at 256 to the first batch and from there on.
    first = plan.stages[0].batch
    assert (plan.optimizer, plan.rule, plan.recipe.optimizer.scale) == ("lars", "sqrt", None)
    assert plan.recipe.optimizer.lr == pytest.approx(4.0 * math.sqrt(first / 256), rel=1e-3)
    assert plan.recipe.global_batch.lr == "sqrt"  # type: ignore[union-attr]


def test_few_steps_are_proposed_muon(digits: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", digits, "duration=45 epochs", steps=180)
    plan = proposed(run, 4)
    assert plan.steps < 500
    assert (plan.optimizer, plan.recipe.optimizer.name) == ("muon", "muon")
    assert "few" in plan.reason
    assert open_inputs(plan.recipe).plan.total == plan.steps
    muon = "optimizer={name: muon, lr: 0.2}"
    of_muon = make_run(tmp_path / "muon", digits, "duration=45 epochs", muon, steps=180)
    kept = proposed(of_muon, 4)
    assert kept.reason.startswith("that of the run")
    root = math.sqrt(kept.stages[0].batch / 256)
    assert kept.lr == pytest.approx(0.2 * root, rel=1e-3)
    rest = kept.recipe.optimizer.rest  # type: ignore[union-attr]
    assert rest.lr == pytest.approx(3e-4 * root, rel=1e-3)


def test_where_one_batch_is_fastest_throughout_it_is_a_number(digits: Path, tmp_path: Path) -> None:
    plan = proposed(make_run(tmp_path / "run", digits), 4, bandwidth=1e12)  # all is hidden
    assert [stage.phases for stage in plan.stages] == [["part 1", "part 2", "part 3"]]
    assert plan.recipe.global_batch == plan.stages[0].batch == 256
    assert plan.seconds == pytest.approx(plan.constant.seconds, rel=0.01)


def invoke(*arguments: object) -> Any:
    command = ["advise", *map(str, arguments)]
    return CliRunner().invoke(cli, command, catch_exceptions=False)


def test_from_the_command_line_to_a_recipe_that_check_takes(digits: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", digits)
    written = tmp_path / "grown.yaml"
    more = ("--schedule", "--bandwidth", 1, "--latency", 0, "--parameters", PARAMETERS)
    done = invoke(run.path, *more, "--gpus", 4, "--write", written)
    assert done.exit_code == 0
    plan = proposed(run, 4)
    assert f"predicted: {plan.steps:,} steps, {plan.samples:,} samples" in done.output
    assert parse_recipe(read_yaml(written), str(written)) == plan.recipe
    assert check(plan.recipe, 4)["steps"] == plan.steps
    with pytest.raises(UserError, match="File exists; name a file that is not there"):
        invoke(run.path, *more, "--gpus", 4, "--write", written)
    values = json.loads(invoke(run.path, *more, "--json").output)
    assert (values["gpus"], values["written"]) == (2, None)  # as many as the run had
    assert values["steps"] == sum(stage["steps"] for stage in values["stages"])


def test_what_has_no_schedule_is_refused(digits: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", digits)
    more = ("--parameters", PARAMETERS)
    for arguments, says in (
        (("--gpus", 4), "--gpus and --write are for a schedule"),
        (("--schedule", "--target-time", "1h"), "name it by --gpus"),
        (("--schedule", "--gpus", 4096), "--gpus 4096: one step of them is 262,144 samples, more "),
    ):
        with pytest.raises(UserError, match=says):
            invoke(run.path, *more, *arguments)
