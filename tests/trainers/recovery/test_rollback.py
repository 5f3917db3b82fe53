"""Rollback: what counts as bad, and that every start steps over the same steps."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.recovery import Recovery, Spike
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.start import agent_command
from bigbatch.trainers import worker
from bigbatch.trainers.engine import open_engine
from bigbatch.trainers.ledger.lines import read_ledger
from bigbatch.trainers.recovery.rollback import (
    Rollback,
    check_step,
    read_rollbacks,
    remove_stale,
    spikes,
)
from tests.helpers import warm

SPIKE = Spike(factor=2, deviations=8, window=10)
CALM = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9, 1.05, 0.95]


@pytest.mark.parametrize(
    ("loss", "bad"), [(1.0, False), (1.9, False), (2.1, True), (0.0, False), (1e9, True)]
)
def test_a_spike_exceeds_factor_and_deviations(loss, bad):
    assert spikes(loss, CALM, SPIKE) is bad


def test_what_is_noisy_anyway_does_not_spike():
    noisy = [0.5, 1.5] * 5
    assert not spikes(3.0, noisy, SPIKE)  # over the factor, within the deviations
    assert spikes(3.0, noisy, Spike(factor=2, deviations=2, window=10))


def test_nothing_spikes_before_a_window_is_full():
    assert not spikes(100.0, CALM[1:], SPIKE)


@given(st.lists(st.floats(0, 100), min_size=10, max_size=30), st.floats(0, 1000))
def test_only_the_last_window_counts(losses, loss):
    assert spikes(loss, losses, SPIKE) == spikes(loss, losses[-10:], SPIKE)


def check(step=50, loss=1.0, norm=1.0, earlier=None, over=(), may_overflow=False, **recovery):
    earlier = list(CALM) if earlier is None else earlier
    return check_step(
        Recovery(**recovery), step, loss, norm,
        earlier=earlier, skipped_steps=list(over), may_overflow=may_overflow,
    )  # fmt: skip


def test_a_good_step_is_taken_and_remembered():
    earlier = list(CALM)
    assert check(loss=1.2, earlier=earlier, spike=SPIKE, max_rollbacks=1)
    assert earlier == [*CALM[1:], 1.2]


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"norm": math.inf}, {"loss": 9.0}])
def test_a_bad_step_goes_back(bad):
    with pytest.raises(Rollback, match="step 50: loss") as raised:
        check(**bad, spike=SPIKE, max_rollbacks=1, skip_steps=4)
    assert raised.value.steps == [47, 50]


def test_without_rollbacks_a_step_that_is_not_finite_ends_the_run():
    with pytest.raises(UserError, match=r"loss nan.*the weights were not touched"):
        check(loss=math.nan)
    with pytest.raises(UserError, match="after 1 rollbacks"):
        check(loss=math.nan, max_rollbacks=1, over=[[3, 4]])


def test_fp16_overflows_are_no_mistake():
    assert not check(norm=math.inf, may_overflow=True, max_rollbacks=1)


def test_what_is_stepped_over_is_not_judged_again():
    earlier = list(CALM)
    assert not check(loss=math.nan, over=[[50, 55]], earlier=earlier, max_rollbacks=1)
    assert earlier == CALM
    assert check(step=49, over=[[50, 55]], max_rollbacks=1)


def saved(folder, step, over=()):
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"over": list(over)}))
    return path


def test_checkpoints_that_took_in_a_bad_step_go(tmp_path):
    before, inside, after = (saved(tmp_path, n) for n in (10, 15, 30))
    replayed = saved(tmp_path, 28, [[10, 20]])
    remove_stale(tmp_path, [[10, 20]])
    assert sorted(tmp_path.iterdir()) == [before, replayed]
    assert not inside.exists()
    assert not after.exists()


def test_if_none_is_from_before_nothing_is_removed(tmp_path):
    path = saved(tmp_path, 15)
    with pytest.raises(UserError, match="from before step 10"):
        remove_stale(tmp_path, [[10, 20]])
    assert path.exists()


def test_spikes_need_rollbacks():
    with pytest.raises(UserError, match=r"recovery.max_rollbacks is 0"):
        load_recipe("digits", ["recovery={spike: {factor: 3}}"])


def train(run: RunDir, ranks: int, stop_at: int) -> None:
    command = agent_command(run.path, ranks, stop_at=stop_at)
    done = warm.run(command, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_goes_back_does_so_alike_however_it_is_interrupted(digits, tmp_path):
    changes = [
        f"data.path={digits}", "log.wandb=off", "data.workers=0", "checkpoint.every=4 steps",
        "log.ledger_every=1",
        "global_batch=16", "micro_batch=4", "schedule.warmup=6 steps", "schedule.rewarmup=0 steps",
        "optimizer.lr=30", "recovery.max_rollbacks=50",
        "recovery.spike={factor: 1.02, deviations: 1, window: 5}", "recovery.skip_steps=3",
    ]  # fmt: skip
    runs = [create_run(tmp_path / name, load_recipe("digits", changes)) for name in ("a", "b")]
    train(runs[0], 2, 24)
    for stop in (7, 15, 18, 24):
        train(runs[1], 1, stop)
    over = [read_rollbacks(run) for run in runs]
    assert over[0]
    assert over[0] == over[1]
    manifests = [run.checkpoints / "step-00000024" / "manifest.json" for run in runs]
    first, second = (json.loads(m.read_text())["files"] for m in manifests)
    assert first == second
    for run in runs:
        steps = [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == "train"]
        assert steps == list(range(1, 25))
    ledgers = [read_ledger(run.ledger) for run in runs]
    assert [x.broken for x in ledgers] == [None, None]
    assert [s.digests for s in ledgers[0].steps.values()] == [
        s.digests for s in ledgers[1].steps.values()
    ]
    assert list(ledgers[0].steps) == list(range(1, 25))


def test_a_rollback_leaves_a_loss_scaler_ready_for_the_next_try(digits, tmp_path, monkeypatch):
    def as_fp16(*arguments, **options):  # on a CPU, where the recipe may not ask for it
        engine = open_engine(*arguments, **options)
        accelerator = engine.accelerator
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
        monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
        return engine

    monkeypatch.setattr(worker, "open_engine", as_fp16)
    changes = [
        f"data.path={digits}", "log.wandb=off", "data.workers=0", "duration=40 steps",
        "global_batch=8", "micro_batch=8", "schedule={name: constant}", "optimizer.lr=30",
        "data.image_size=16",
        "checkpoint.every=2 steps", "recovery.max_rollbacks=50", "recovery.skip_steps=1",
        "recovery.spike={factor: 1.02, deviations: 1, window: 5}",
    ]  # fmt: skip
    run = create_run(tmp_path / "run", load_recipe("digits", changes))
    assert worker.main([str(run.path), "--stop-at", "12"]) == 0
    assert read_rollbacks(run)


def test_losses_of_larger_batches_say_nothing_of_smaller_ones(digits, tmp_path):
    """They lie closer together, so that any loss of a few samples leaps out of them."""
    pieces = "[{batch: 64, until: 320 samples}, {batch: 8}]"
    changes = [
        f"data.path={digits}", "log.wandb=off", "data.workers=0", "duration=400 samples",
        f"global_batch={{name: stages, pieces: {pieces}}}", "micro_batch=8", "data.image_size=16",
        "schedule={name: constant}", "optimizer={name: sgd, lr: 1.0e-9}",
        "recovery={max_rollbacks: 1, spike: {factor: 1.001, deviations: 1, window: 5}}",
    ]  # fmt: skip
    run = create_run(tmp_path / "run", load_recipe("digits", changes))
    assert worker.main([str(run.path), "--stop-at", "10"]) == 0  # five of each
    assert read_rollbacks(run) == []
