"""That a step comes out again bit for bit, wherever a replay begins, and nothing is changed."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.start import agent_command
from bigbatch.trainers.recovery.rollback import read_rollbacks
from bigbatch.trainers.replay.environment import differences
from bigbatch.trainers.replay.look import look
from bigbatch.trainers.replay.past import find_past
from bigbatch.trainers.replay.replay import KEYS, open_replay, replay_step
from bigbatch.trainers.replay.summary import in_words, summarise
from tests.helpers import warm
from tests.trainers.replay.conftest import copied, small, train_here, untouched

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("step", "start"),
    [(7, 0), pytest.param(7, 3, marks=pytest.mark.slow), (7, 4), (6, 3), (4, None), (1, None)],
)
def test_each_step_of_two_ranks_replays_from_any_checkpoint_bit_for_bit(
    preempted: RunDir, step: int, start: int | None
) -> None:
    """On one process, over a preemption; every step on the way is compared."""
    with untouched(preempted):
        found = replay_step(preempted, step, start=start)
    first = found.past.start
    assert first == (start if start is not None else {4: 3, 1: 0}[step])
    assert sorted(found.past.records) == list(range(first + 1, step + 1))
    assert found.lines == step - first
    assert found.compared >= 9 * (step - first)  # of records, and of the ledger
    assert found.differences == ()
    assert found.same is True
    assert found.updated
    kept = (preempted.checkpoints / f"step-{step:08d}").is_dir()
    assert found.checkpoint is (True if kept else None)
    assert len(found.earlier) == step - first - 1
    square = math.fsum(norm**2 for norm in found.norms.values())
    assert math.sqrt(square) == pytest.approx(found.record["grad_norm"], rel=1e-6)


def test_another_record_or_other_weights_differ_by_name(preempted: RunDir, tmp_path: Path) -> None:
    run = copied(preempted, tmp_path)
    lines = run.metrics.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if record["kind"] == "train" and record["step"] == 5:
            record["loss"] = math.nextafter(record["loss"], 9.0)  # the last bit
            edited = record["loss"]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = replay_step(run, 6, start=4)
    assert [(d.step, d.name, d.recorded) for d in found.differences] == [(5, "loss", edited)]
    assert found.checkpoint is True
    assert found.same is False
    shutil.rmtree(run.checkpoints / "step-00000006")
    shutil.copytree(run.checkpoints / "step-00000004", run.checkpoints / "step-00000006")
    state = run.checkpoints / "step-00000006" / "state.json"
    state.write_text(state.read_text().replace('"step": 4', '"step": 6'))
    again = replay_step(run, 6, start=4)
    assert again.checkpoint is False


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": 8}, "preempted has no step 8: its steps are 1 to 7"),
        ({"step": 5, "start": 2}, "there are checkpoints after steps 3, 4, and 0, the model as"),
        ({"step": 5, "before_rollback": True}, "it had no rollback; leave out --before-rollback"),
    ],
)
def test_what_is_out_of_reach(preempted: RunDir, change: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        find_past(preempted, **change)  # type: ignore[arg-type]


def test_what_a_run_lacks_is_said(preempted: RunDir, tmp_path: Path) -> None:
    fresh = create_run(tmp_path / "fresh", preempted.recipe())
    with pytest.raises(UserError, match="has finished no step yet; train it first"):
        find_past(fresh, 1)
    run = copied(preempted, tmp_path)
    (run.checkpoints / "step-00000004" / "model.safetensors").write_bytes(b"gone")
    past = find_past(run, 6)
    assert past.start == 3
    assert "step-00000004/model.safetensors differs from its manifest" in past.notes[0]
    with pytest.raises(UserError, match="leave out --from, or name another one"):
        find_past(run, 6, start=4)
    manifest = json.loads(run.manifest.read_text())
    origin = {"run": "runs/parent", "step": 3, "at": 3}
    run.manifest.write_text(json.dumps(manifest | {"forked_from": origin}))
    with pytest.raises(UserError, match=r"branched off runs/parent after step 3: replay it there"):
        find_past(run, 2)
    shutil.rmtree(run.checkpoints / "step-00000003")
    with pytest.raises(UserError, match=r"out of reach.*after steps 4, 6, 7.*bigbatch fork"):
        find_past(run, 4)


def test_shards_that_are_gone_or_changed_are_said(
    preempted: RunDir, digits: Path, tmp_path: Path
) -> None:
    run = copied(preempted, tmp_path)
    text = run.recipe_file.read_text()
    run.recipe_file.write_text(text.replace(str(digits), str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="is no folder here"):
        replay_step(run, 4)
    other = tmp_path / "other"
    other.mkdir()
    for name, source in (("train", "val"), ("val", "val"), ("test", "test")):
        (other / name).symlink_to(digits / source)  # images that the run has not seen
    run.recipe_file.write_text(text.replace(str(digits), str(other)))
    for start in (3, 0):
        with pytest.raises(UserError, match=r"was written with another recipe|on other data"):
            replay_step(run, 4, start=start)


def test_differences_of_machines_have_names(preempted: RunDir, tmp_path: Path) -> None:
    past = find_past(preempted, 4)
    assert differences(past, CPU) == []
    assert past.attempt(4)["world_size"] == 2
    assert find_past(preempted, 5).attempt(5)["world_size"] == 1
    run = copied(preempted, tmp_path)
    told = [event | {"device": "cuda:0"} for event in read_jsonl(run.events)]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in told))
    manifest = json.loads(run.manifest.read_text())
    manifest["versions"]["torch"] = "1.0"
    run.manifest.write_text(json.dumps(manifest))
    here = torch.__version__
    found = differences(find_past(run, 4), CPU)
    assert found[0] == "device cuda:0 then, cpu here"
    assert found[1].startswith("torch 1.0 then, ")
    assert here.partition("+")[0] in found[1]


@pytest.fixture(scope="module")
def overflowing(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose rate is so high that its second step is not finite, which ends it."""
    changes = small(digits, "optimizer={name: sgd, lr: 1.0e+30}", "log.diagnosis=false")
    run = create_run(tmp_path_factory.mktemp("runs") / "wild", load_recipe("digits", changes))
    assert train_here(run, 5) == 2
    return run


def test_the_step_that_ended_a_run_is_explained(overflowing: RunDir) -> None:
    (event,) = [e for e in read_jsonl(overflowing.events) if e["kind"] == "non_finite"]
    step = event["step"] + 1
    assert event["replay"] == f"bigbatch replay wild --step {step}"
    with untouched(overflowing):
        past = find_past(overflowing, step)
        assert past.refused
        with open_replay(past) as replay:
            replay.advance(step - 1)
            replayed = replay.take()
            looked = look(replay, replayed)
    assert replayed.same is True
    assert replayed.record["loss"] is None
    assert not replayed.updated
    assert all(
        torch.equal(replayed.before[n], replayed.after[n])
        for n, _ in replay.engine.module.named_parameters()
    )
    assert looked.parts[0].bad_layer is not None
    result = summarise(replayed, looked, [str(n) for n in range(10)], [])
    assert result["why_not"] == "loss or gradient is not finite"
    assert result["guilty"]["non_finite"] == looked.parts[0].bad_layer
    assert any(line.startswith("first not finite: ") for line in in_words(result))
    with pytest.raises(UserError, match=f"its steps are 1 to {step}"):
        find_past(overflowing, step + 1)


@pytest.mark.slow
def test_after_a_rollback_steps_stepped_over_are_so_again(rolled_back: RunDir) -> None:
    with untouched(rolled_back):
        found = replay_step(rolled_back, 12, start=0)
    assert found.same is True
    assert found.lines > 1
    assert found.compared == 3 * 12 + 6 * found.lines  # of the ledger
    assert found.checkpoint is True
    _, last = read_rollbacks(rolled_back)[0]
    over = replay_step(rolled_back, last + 1)
    assert over.same is True
    assert not over.updated


@pytest.mark.slow
def test_a_step_is_shown_as_it_was_before_the_run_went_back(rolled_back: RunDir) -> None:
    event = next(e for e in read_jsonl(rolled_back.events) if e["kind"] == "rollback")
    first, step = event["first"], event["last"] + 1
    assert event["replay"] == f"bigbatch replay back --step {step} --before-rollback"
    with untouched(rolled_back):
        found = replay_step(rolled_back, step, before_rollback=True)
    assert found.past.refused
    assert found.past.start <= first
    assert found.past.skipped == ()
    assert found.past.records[step] == {"loss": event["loss"], "grad_norm": event["grad_norm"]}
    assert found.same is True
    assert not found.updated
    honoured = replay_step(rolled_back, step)
    assert honoured.record["loss"] != found.record["loss"]  # fewer updates lie before it


@pytest.mark.slow
def test_spikes_name_the_command_when_nothing_is_left_to_try(digits: Path, tmp_path: Path) -> None:
    changes = small(
        digits,
        *("optimizer.lr=30", "recovery.max_rollbacks=1", "recovery.skip_steps=1"),
        *("recovery.spike={factor: 1.01, deviations: 0.5, window: 5}", "log.diagnosis=false"),
        *("evaluate.every=50 steps", "duration=60 steps"),
    )
    run = create_run(tmp_path / "spiky", load_recipe("digits", changes))
    assert train_here(run, 40) == 2
    event = [e for e in read_jsonl(run.events) if e["kind"] == "spike"][-1]
    assert event["replay"] == f"bigbatch replay spiky --step {event['step']}"
    found = replay_step(run, event["step"])
    assert found.past.refused
    assert found.same is True
    assert found.record["loss"] == event["loss"]


def test_no_stand_in_is_left_behind(preempted: RunDir) -> None:
    threads = torch.get_num_threads()
    with open_replay(find_past(preempted, 4)) as replay:
        scratch = replay.job.run.path.parent
        assert scratch.is_dir()
        assert preempted.path not in scratch.parents
        assert isinstance(replay.engine.module, nn.Module)
    assert not scratch.exists()
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_what_two_ranks_added_up_in_their_own_order_is_said(digits: Path, tmp_path: Path) -> None:
    """The same samples and losses; gradients differ by rounding, and the reason has a name."""
    changes = small(digits, "reduction=overlapped", "log.diagnosis=false")
    run = create_run(tmp_path / "rounded", load_recipe("digits", changes))
    done = warm.run(agent_command(run.path, 2, stop_at=3), capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = replay_step(run, 3)
    assert found.past.start == 0
    assert found.record["loss"] == pytest.approx(found.past.records[3]["loss"], rel=1e-3)
    in_the_first = {d.name for d in found.differences if d.step == 1}
    assert not in_the_first & {"loss", "lr", KEYS, "loss in the ledger"}
    assert found.same is False
    (reason,) = differences(found.past, CPU)
    assert reason.startswith("reduction: overlapped adds gradients up in an order that depends on")
    assert "2 then, 1 here" in reason
