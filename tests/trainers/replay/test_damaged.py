"""That what is damaged in a run's files is left out or named, and ends no replay in a traceback."""

import json
import os
import shutil
from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.replay import __main__ as entry
from bigbatch.trainers.replay.past import find_past
from bigbatch.trainers.replay.replay import open_replay, replay_step
from bigbatch.trainers.replay.summary import reach
from tests.trainers.replay.conftest import copied

RECORDS = (
    '{"kind": "train"}',
    '{"kind": "train", "step": [1]}',
    '{"kind": "train", "step": "2", "loss": 1.0}',
    '{"kind": "train", "step": 2, "grad_norm": "high", "step_s": "long"}',
    '{"kind": "gradients", "step": 3}',
    '{"kind": "gradients", "step": 3, "norms": [1.0]}',
    '{"kind": "gradients", "step": 3, "norms": {"head.weight": "high"}}',
    '{"kind": "confusion", "step": 3}',
    '{"kind": "eval", "split": "val"}',
    '{"kind": ["train"], "step": 3}',
)
EVENTS = (
    '{"kind": "start"}',
    '{"kind": "start", "step": "0"}',
    '{"kind": "start", "step": 3, "threads": "all", "device": "none", "environment": [1], '
    '"world_size": {}}',
    '{"kind": "start", "step": 3, "threads": -1}',
    '{"kind": "rollback"}',
    '{"kind": "non_finite"}',
    '{"kind": "spike", "refused": true}',
    '{"kind": ["start"], "step": 3}',
)


def test_records_and_events_of_no_form_are_left_out(preempted: RunDir, tmp_path: Path) -> None:
    run = copied(preempted, tmp_path)
    for path, lines in ((run.metrics, RECORDS), (run.events, EVENTS)):
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
    past = find_past(run, 6, start=3)
    assert sorted(past.records) == [4, 5, 6]
    assert reach(past) is None
    assert replay_step(run, 4).same is True
    with pytest.raises(UserError, match="its steps are 1 to 7"):
        find_past(run, 8)


@pytest.mark.parametrize("damage", ["torn", "flipped", "no state", "no list", "gone"])
def test_damaged_weights_after_the_step_are_not_those_of_it(
    preempted: RunDir, tmp_path: Path, damage: str
) -> None:
    run = copied(preempted, tmp_path)
    folder = run.checkpoints / "step-00000004"
    past = find_past(run, 4)
    with open_replay(past) as replay:
        replay.advance(3)
        match damage:
            case "torn":
                (folder / "model.safetensors").write_bytes(b"gone")
            case "flipped":
                whole = (folder / "model.safetensors").read_bytes()
                flipped = whole[:-1] + bytes([whole[-1] ^ 1])
                (folder / "model.safetensors").write_bytes(flipped)
            case "no state":
                (folder / "state.json").unlink()
            case "no list":
                state = json.loads((folder / "state.json").read_text())
                (folder / "state.json").write_text(json.dumps(state | {"over": [1]}))
            case "gone":  # a run that goes on keeps few
                shutil.rmtree(folder)
        found = replay.take()
    assert found.checkpoint is (None if damage == "gone" else False)
    if damage in ("torn", "flipped", "no list"):
        assert found.unlike is not None
        assert "differs from its manifest (size or SHA-256)" in found.unlike[0]
    assert found.same is (damage == "gone")


def test_a_damaged_newest_checkpoint_is_in_nobodys_way(preempted: RunDir, tmp_path: Path) -> None:
    """Without one before the step, the newest that says so tells of which data the run was."""
    run = copied(preempted, tmp_path)
    (run.checkpoints / "step-00000007" / "state.json").write_text("{")
    (run.checkpoints / "step-00000006" / "state.json").unlink()
    assert replay_step(run, 1).same is True


def test_a_checkpoint_that_goes_away_meanwhile_is_said(preempted: RunDir, tmp_path: Path) -> None:
    run = copied(preempted, tmp_path)
    past = find_past(run, 4)
    shutil.rmtree(run.checkpoints / "step-00000003")
    with (
        pytest.raises(UserError, match=r"step-00000003 cannot be read any more.*so ask again"),
        open_replay(past),
    ):
        pass


def test_whoever_stops_reading_gets_no_traceback(
    preempted: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(*given: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(entry, "_step", ends)
    monkeypatch.setattr(os, "dup2", lambda *files: None)
    assert entry.main(["step", str(preempted.path), "--step", "1"]) == 1
    assert capsys.readouterr().err == ""
