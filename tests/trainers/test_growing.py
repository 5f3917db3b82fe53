"""A batch that the run decides on by its gradient noise: what it decides, and that it stands."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.configs.decisions import read_decisions, recipe_of
from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.child import Children
from bigbatch.launcher.fork import find_checkpoint, make_branches, plan_branch
from bigbatch.launcher.prove import not_reached, read_trace, run_and_kill, run_to_end
from bigbatch.trainers import worker
from bigbatch.trainers.dynamics.look import look
from bigbatch.trainers.planning.inputs import open_inputs
from bigbatch.trainers.recovery.stored import AVERAGE, MODEL, OPTIMIZER
from bigbatch.trainers.replay.replay import replay_step

EVERY, TARGET, SAMPLES = 64, 0.72, 960
GROWING = f"{{name: noise_scale, start: 16, most: 64, every: {EVERY} samples, target: {TARGET}}}"


class Net(nn.Module):
    """A linear model behind BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigbatch.trainers.job.build_model", lambda *_, **__: Net())
    monkeypatch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])  # takes seconds


def settings(digits: Path, *changes: str) -> list[str]:
    return [
        *(f"data.path={digits}", "log.wandb=off", "data.workers=0", f"duration={SAMPLES} samples"),
        *(f"global_batch={GROWING}", "global_batch.lr=sqrt", "micro_batch=8", "reduction=exact"),
        *("schedule={name: cosine, warmup: 96 samples}", "ensemble.soup=false", "clip=null"),
        "optimizer={name: adamw, lr: 0.05, betas: [0.8, 0.95], weight_decay: 0.1}",
        *("global_batch.betas=power", "global_batch.weight_decay=timescale", "log.every=1"),
        *("average={name: ema, half_life: 300 samples}", "global_batch.batch_norm=power"),
        *(
            "checkpoint={every: 80 samples, keep: 99}",
            "evaluate={every: 400 samples, precise_bn_images: 64}",
        ),
        *(
            "data.image_size=8",
            "augment.affine=null",
            "log.diagnosis=false",
            "log.ledger_every=1",
            "log.samples=true",
        ),
        *changes,
    ]


def new_run(folder: Path, digits: Path, *changes: str) -> RunDir:
    return create_run(folder, load_recipe("digits", settings(digits, *changes), say=None))


def train(run: RunDir, *options: str) -> None:
    assert worker.main([str(run.path), *options]) == 0


def records(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_jsonl(run.metrics) if r["kind"] == kind]


def decisions(run: RunDir) -> list[dict[str, Any]]:
    return [e for e in read_jsonl(run.events) if e["kind"] == "batch"]


def last(run: RunDir) -> Path:
    return max(run.checkpoints.glob("step-????????"))


def assert_same(run: RunDir, other: RunDir) -> None:
    """Weights, optimizer state, average, decisions and records of steps, bit for bit."""
    assert last(run).name == last(other).name
    for name in (MODEL, OPTIMIZER, AVERAGE):
        ours, theirs = load_file(last(run) / name), load_file(last(other) / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert read_decisions(run) == read_decisions(other)
    for one in (run, other):
        state = json.loads((last(one) / "state.json").read_text())
        assert state["batches"] == [list(decision) for decision in read_decisions(one)]
    ledgers = [[x for x in read_jsonl(r.ledger) if x["kind"] == "step"] for r in (run, other)]
    assert ledgers[0] == ledgers[1] != []
    keys = ("step", "global_batch", "samples", "loss", "lr", "grad_norm", "noise_scale", "epoch")
    found = [[{k: r[k] for k in keys} for r in records(x, "train")] for x in (run, other)]
    assert found[0] == found[1]
    assert records(run, "eval") == records(other, "eval")


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigbatch.trainers.job.build_model", lambda *_, **__: Net())
        patch.setattr("bigbatch.trainers.finish.say_results", lambda *_: [])
        run = new_run(tmp_path_factory.mktemp("growing") / "whole", digits)
        train(run)
    return run


def test_the_batch_doubles_where_the_recorded_gradients_ask_for_it(whole: RunDir) -> None:
    """Independent: a walk over positions, the estimator by its formula, weights 0.99^k."""
    steps = {r["step"]: r for r in records(whole, "train")}
    noise, signal = 0.0, 0.0
    batch, position, decided = 16, 0, []
    for step in range(1, len(steps) + 1):
        before, record = position, steps[step]
        position += batch
        assert (record["global_batch"], record["samples"]) == (batch, position)
        small, large = record["grad_sq_micro"], record["grad_norm"] ** 2
        noise = 0.99 * noise + 0.01 * (small - large) / (1 / 8 - 1 / batch)
        signal = 0.99 * signal + 0.01 * (batch * large - 8 * small) / (batch - 8)
        seen = min(before, SAMPLES)
        rate = (
            seen / 96 if seen < 96 else 0.5 + 0.5 * math.cos(math.pi * (seen - 96) / (SAMPLES - 96))
        )
        assert record["lr"] == pytest.approx(0.05 * rate * (batch / 16) ** 0.5, rel=1e-9)
        passed = position // EVERY > before // EVERY
        if passed and batch < 64 and position < SAMPLES:
            if noise > 0 and TARGET * noise >= 2 * batch * max(signal, 0):
                batch *= 2
            decided.append((position, batch))
    assert position - record["global_batch"] < SAMPLES <= position
    assert read_decisions(whole) == decided
    assert [b for _, b in decided].count(16) > 0  # it has not always asked for it
    assert batch == 64
    assert [e["step"] for e in decisions(whole)] == [
        s for s, r in steps.items() if r["samples"] in dict(decided)
    ]
    starts = [e for e in read_jsonl(whole.events) if e["kind"] == "start"]
    assert starts[-1]["total_steps"] == len(steps) < starts[0]["total_steps"] == SAMPLES // 16
    assert json.loads(whole.summary.read_text())["samples"] == position


def test_the_ledger_has_the_step_before_a_change_and_samples_count_real_steps(
    whole: RunDir,
) -> None:
    steps = [r["step"] for r in records(whole, "train")]
    assert [x["step"] for x in read_jsonl(whole.ledger) if x["kind"] == "step"] == steps
    assert look(whole).steps == len(steps)
    grown = next(e["step"] for e in decisions(whole) if e["global_batch"] == 64)
    assert look(whole, until=grown + 2).found.positions == recipe_samples(whole, grown + 2)


def test_a_run_that_is_stopped_decides_the_same(
    whole: RunDir, digits: Path, tmp_path: Path
) -> None:
    """Stopped before a decision, in the step that it comes after, and behind one."""
    run = new_run(tmp_path / "stopped", digits)
    grown = [e["step"] for e in decisions(whole) if e["global_batch"] > 16]
    for step in (grown[0] - 1, grown[0], grown[1] + 1):
        train(run, "--stop-at", str(step))
    train(run)
    assert_same(run, whole)


STAGES = "{name: stages, pieces: [{batch: 16, until: 160 samples}, {batch: 64}], lr: adascale}"
SGD = "optimizer={name: sgd, lr: 0.05, momentum: 0.5}"


def test_the_rate_follows_adascale_s_gain_also_where_it_is_resumed(
    digits: Path, tmp_path: Path
) -> None:
    """Independent: equation 3 of the paper with averages of the records before each step."""
    others = ("global_batch", "optimizer", "average")
    kept = [key for key in settings(digits) if not key.startswith(others)]
    recipe = load_recipe("digits", [*kept, f"global_batch={STAGES}", SGD], say=None)
    runs = [create_run(tmp_path / name, recipe) for name in ("whole", "stopped")]
    train(runs[0], "--stop-at", "16")
    for step in (9, 13, 16):
        train(runs[1], "--stop-at", str(step))
    found = [records(run, "train") for run in runs]
    assert [(r["lr"], r["loss"]) for r in found[0]] == [(r["lr"], r["loss"]) for r in found[1]]
    noise = signal = before = 0.0
    gains = []
    for record in found[0]:
        batch = record["global_batch"]
        rate = before / 96 if before < 96 else None
        if rate is None:  # of 10 steps of 16 and whole ones of 64
            rate = 0.5 + 0.5 * math.cos(math.pi * (before - 96) / (10 * 16 + 13 * 64 - 96))
        variance, mean = max(noise, 0.0) / 16, max(signal, 0.0)
        below = variance / (batch / 16) + mean
        gains.append((variance + mean) / below if below else 1.0)
        assert record["lr"] == pytest.approx(0.05 * rate * gains[-1], rel=1e-9)
        small, large = record["grad_sq_micro"], record["grad_norm"] ** 2
        noise = 0.99 * noise + 0.01 * (small - large) / (1 / 8 - 1 / batch)
        signal = 0.99 * signal + 0.01 * (batch * large - 8 * small) / (batch - 8)
        before = record["samples"]
    assert gains[:10] == [1.0] * 10
    assert all(1.0 < gain < 4.0 for gain in gains[10:])


def test_the_ledger_of_a_step_before_a_change_does_not_ask_who_saved_there(
    digits: Path, tmp_path: Path
) -> None:
    """`betas: power` changes the optimizer's counts with the batch: of the step that it begins."""
    stages = "global_batch={name: stages, pieces: [{batch: 16, until: 64 samples}, {batch: 32}]}"
    others = [key for key in settings(digits) if not key.startswith(f"global_batch={GROWING}")]
    short = ["duration=192 samples", "schedule={name: constant}", "checkpoint.every=9 epochs"]
    recipe = load_recipe("digits", [stages, *others, *short], say=None)
    run, stopped = (create_run(tmp_path / name, recipe) for name in ("run", "stopped"))
    train(run, "--stop-at", "6")
    for step in (4, 6):
        train(stopped, "--stop-at", str(step))
    lines = [[x for x in read_jsonl(r.ledger) if x["kind"] == "step"] for r in (run, stopped)]
    assert [x["step"] for x in lines[0]] == [1, 2, 3, 4, 5, 6]
    assert lines[0] == lines[1]
    assert replay_step(run, 4).same is True


def test_what_is_written_down_stands(whole: RunDir, digits: Path, tmp_path: Path) -> None:
    """A decision that the run was killed after: the next start follows it, whatever it measures."""
    run = new_run(tmp_path / "written", digits)
    train(run, "--stop-at", "3")
    event = {"kind": "batch", "step": 4, "samples": 64, "global_batch": 32}
    with run.events.open("a") as file:
        file.write(json.dumps(event) + "\n")
    train(run, "--stop-at", "7")
    assert [r["global_batch"] for r in records(run, "train")] == [16] * 4 + [32] * 3
    assert read_decisions(whole)[0] == (64, 16)
    assert read_decisions(run) == [(64, 32), (128, 32)]


def test_steps_whose_decision_is_lost_are_not_gone_on_from(
    whole: RunDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "lost")
    shutil.copytree(whole.path, run.path)
    lines = run.events.read_text().splitlines(keepends=True)
    run.events.write_text("".join(line for line in lines if '"batch"' not in line))
    (samples, batch), *_ = read_decisions(whole)
    assert worker.main([str(run.path)]) == 2
    says = f"has no event batch of global_batch {batch} at {samples:,} samples"
    assert says in capfd.readouterr().err


@pytest.mark.slow
def test_a_branch_goes_on_by_its_parent_s_decisions(whole: RunDir, tmp_path: Path) -> None:
    grown = [e for e in decisions(whole) if e["global_batch"] > 16]
    step = grown[0]["step"] + 2
    saved = [int(p.name[5:]) for p in whole.checkpoints.glob("step-????????")]
    step = min(s for s in saved if s >= step)
    recipe = whole.recipe()
    checkpoint = find_checkpoint(whole, step)
    plan = plan_branch(whole, checkpoint, tmp_path / "branch", recipe)
    assert plan.same_batch
    (run,) = make_branches(whole, checkpoint, [plan])
    assert read_decisions(run) == [
        d for d in read_decisions(whole) if d[0] <= recipe_samples(whole, step)
    ]
    train(run)
    assert_same(run, whole)


def recipe_samples(run: RunDir, step: int) -> int:
    return open_inputs(recipe_of(run)).plan.timeline.first(step)


def test_what_is_known_ahead(whole: RunDir) -> None:
    recipe = whole.recipe()
    plan = open_inputs(recipe).plan
    assert plan.first_decision == 4
    assert not_reached(recipe, 4) == (
        "global_batch is decided on first at step 4, which 4 steps do not reach; --steps 6 does"
    )
    assert not_reached(recipe, 5) is None
    (note,) = [n for n in open_inputs(recipe).notes if "noise" in n]
    # 4 of 16, 2 of 32, then (960 - 128) / 64 = 13; or 60 of 16
    assert note.endswith("looked at every 64 samples: 19 to 60 steps")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["duration=50 steps"], "duration = 50 steps: .* give it in epochs or samples"),
        (["micro_batch=16"], "start 16 is one micro-batch of 16"),
        (["schedule={name: cycles, cycles: 2, warmup: 0 epochs}"], "schedule cycles begins at"),
        (["global_batch.most=48"], "most 48 is not 16 .start. doubled some times"),
        (["global_batch.every=5 steps"], "every = 5 steps: .* in epochs or samples"),
        (
            ["data.progressive={start: 8, after: 0 epochs, until: 800 samples}"],
            "data.progressive b",
        ),
        (["optimizer.name=lion"], "betas: power is for"),
    ],
)
def test_what_needs_steps_ahead_is_refused(digits: Path, changes: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("digits", settings(digits, *changes), say=None)


def test_events_that_somebody_has_damaged_are_no_decisions(digits: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", digits)
    events: list[dict[str, Any]] = [
        {"kind": "batch", "samples": 64, "global_batch": 32},
        {"kind": "batch", "samples": 64, "global_batch": 64},  # the first one stands
        *({"kind": "batch", "samples": s, "global_batch": 32} for s in ("64", None, 1.5, -64)),
        *({"kind": "batch", "samples": 128, "global_batch": b} for b in (0, -16, 48, "64")),
        {"kind": "start", "samples": 192, "global_batch": 64, "note": "batch"},
    ]
    run.events.write_text("".join(json.dumps(e) + "\n" for e in events) + '{"kind": "batch", "sam')
    line = recipe_of(run).timeline(1000)
    assert (line.starts, line.batches) == ((0, 4), (16, 32))


def test_a_period_shorter_than_a_step_is_refused(digits: Path) -> None:
    recipe = load_recipe("digits", settings(digits, "global_batch.every=60 samples"), say=None)
    with pytest.raises(UserError, match=r"less than a step of 64 \(most\) has"):
        open_inputs(recipe)


def test_a_step_behind_a_change_can_be_had_again(whole: RunDir) -> None:
    """From a checkpoint before the change: of the weights, too."""
    grown = [e["step"] for e in decisions(whole) if e["global_batch"] > 16]
    saved = sorted(int(p.name[5:]) for p in whole.checkpoints.glob("step-????????"))
    start = max(s for s in saved if s < grown[0])
    step = min(s for s in saved if s > grown[0])
    replayed = replay_step(whole, step, start=start)
    assert replayed.record["loss"] == records(whole, "train")[step - 1]["loss"]
    assert replayed.same is True
    assert replayed.checkpoint is True


@pytest.mark.slow
@pytest.mark.timeout(1200)  # eight starts one after another
@pytest.mark.usefixtures("forked")
def test_weights_are_the_same_on_one_rank_and_on_three_killed_five_times_or_not(
    digits: Path, tmp_path: Path
) -> None:
    """A rank that waits in the first steps; kills before, around and behind the decisions."""
    changes = ("model.name=test_resnet", "model.options={}", "data.image_size=16", "log.trace=true")
    steps, runs = 11, {}
    with Children(1, threads=1) as children:
        for ranks in (1, 3):
            runs[ranks] = new_run(tmp_path / f"ranks-{ranks}", digits, *changes)
            run_to_end(runs[ranks], ranks, steps, children)
        killed = new_run(tmp_path / "killed", digits, *changes)
        found = decisions(runs[1])
        grown = [min(e["step"] for e in found if e["global_batch"] == b) for b in (32, 64)]
        assert 0 < grown[0] < grown[1] < steps
        aims = (2, grown[0], grown[0] + 1, grown[1], grown[1] + 1)
        for number, aim in enumerate(aims):
            run_and_kill(killed, (3, 1, 2)[number % 3], steps, aim, children)
        run_to_end(killed, 3, steps, children)
    assert sum(e["kind"] == "start" for e in read_jsonl(killed.events)) > 5
    for run in (runs[3], killed):
        assert_same(run, runs[1])
        assert read_trace(run.trace) == read_trace(runs[1].trace)
