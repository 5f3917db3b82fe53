"""What real runs record of their samples, over preemptions, rollbacks and ranks; what is read."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import change_recipe, load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.index import open_index
from bigbatch.data.order import read_weights
from bigbatch.launcher.batches import Batch, batches
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.fork import find_checkpoint, make_branches, plan_branch
from bigbatch.launcher.start import agent_command
from bigbatch.trainers import worker
from bigbatch.trainers.dynamics.files import ERRORS, MAP, PAGE, RESULT, TABLE
from bigbatch.trainers.dynamics.look import look
from bigbatch.trainers.dynamics.rows import read_rows
from bigbatch.trainers.replay.look import look as look_into
from bigbatch.trainers.replay.past import find_past
from bigbatch.trainers.replay.replay import open_replay
from tests.helpers import warm
from tests.helpers.runs import go_back_once

STEPS, BATCH = 8, 16
SMALL = (
    "model={name: test_resnet, options: {drop_rate: 0.2}}",
    "data={workers: 0, threads: 1, image_size: 16}",
    "log={wandb: off, diagnosis: false, samples: true}",
    f"duration={STEPS} steps",
    f"global_batch={BATCH}",
    "micro_batch=8",
    "schedule={name: constant}",
    "optimizer={name: sgd, lr: 0.1, momentum: 0.9}",
    "loss.label_smoothing=0.1",
    "checkpoint={every: 2 steps, keep: 9}",
    f"evaluate={{every: {STEPS} steps}}",
    "ensemble.soup=false",
)


@pytest.fixture(scope="module", autouse=True)
def no_end() -> Iterator[None]:
    """Runs end with their last step: nobody looks at their scores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigbatch.trainers.run.finish", lambda job, log: None)
        yield


def trained(path: Path, digits: Path, *changes: str) -> RunDir:
    run = create_run(path, load_recipe("digits", [f"data.path={digits}", *SMALL, *changes]))
    assert worker.main([str(run.path)]) == 0
    return run


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return trained(tmp_path_factory.mktemp("runs") / "whole", digits)


def content(run: RunDir) -> bytes:
    return run.samples.read_bytes()


def weights_of(run: RunDir, step: int) -> bytes:
    return (run.checkpoints / f"step-{step:08d}" / "model.safetensors").read_bytes()


def batches_of(run: RunDir) -> list[Batch]:
    """The micro-batches of step 1, as counted before it."""
    return list(batches(run.recipe(), range(1, 2)))


def command(run: RunDir, *options: str) -> Result:
    return CliRunner().invoke(cli, ["samples", str(run.path), *options])


def test_rows_are_those_of_the_replayed_step(whole: RunDir) -> None:
    """By the other way there is to a sample's loss and logits: replay asks the loss for each."""
    rows = read_rows(whole.samples)
    assert rows.shape == (STEPS * BATCH, 3)
    with open_replay(find_past(whole, 5)) as replay:
        replay.advance(4)
        replayed = replay.take()
        looked = look_into(replay, replayed, micro=1)
    own = np.asarray(rows[4 * BATCH + 8 : 5 * BATCH])
    logits, losses = looked.tensors["logits"], looked.tensors["losses"]
    labels = torch.tensor([sample.label for sample in looked.samples if sample.micro == 1])
    np.testing.assert_allclose(own[:, 0], losses.numpy(), rtol=2e-3)
    two = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    margin = logits.gather(1, labels[:, None])[:, 0] - two
    np.testing.assert_array_equal(own[:, 1], margin.half().numpy())
    p = torch.exp(-F.cross_entropy(logits, labels, reduction="none"))
    np.testing.assert_allclose(own[:, 2], p.numpy(), rtol=2e-3)
    of_step = json.loads(whole.metrics.read_text().splitlines()[4])
    losses_of_step = rows[4 * BATCH : 5 * BATCH, 0].astype(float)
    assert losses_of_step.mean() == pytest.approx(of_step["loss"], rel=1e-3)


def test_recording_changes_no_bit_of_the_weights(
    whole: RunDir, digits: Path, tmp_path: Path
) -> None:
    plain = trained(tmp_path / "plain", digits, "log.samples=false")
    assert not plain.samples.exists()
    assert weights_of(plain, STEPS) == weights_of(whole, STEPS)
    with pytest.raises(UserError, match=r"log\.samples was false"):
        look(plain)


FIVE = ((1, 0, b""), (3, 1, b"abc"), (4, 2, b""), (5, 1, b"x"), (7, 1, b""))


@pytest.mark.parametrize(
    "kills", [FIVE[1:2], pytest.param(FIVE, marks=pytest.mark.slow)], ids=["one", "five"]
)
def test_preemptions_leave_the_same_bytes(
    whole: RunDir, tmp_path: Path, kills: tuple[tuple[int, int, bytes], ...]
) -> None:
    """Killed beyond a checkpoint, inside a write, and right at one."""
    run = create_run(tmp_path / "killed", whole.recipe())
    for stop, back, torn in kills:
        assert worker.main([str(run.path), "--stop-at", str(stop)]) == 0
        for path in sorted(run.checkpoints.iterdir())[-back:] if back else []:
            shutil.rmtree(path)
        with run.samples.open("ab") as file:
            file.write(torn)
    assert worker.main([str(run.path)]) == 0
    assert content(run) == content(whole)


@pytest.mark.slow
def test_two_ranks_write_the_same_bytes(whole: RunDir, tmp_path: Path) -> None:
    run = create_run(tmp_path / "two", whole.recipe())
    done = warm.run(agent_command(run.path, 2, stop_at=4), capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert content(run) == content(whole)[: 4 * BATCH * 6]


def test_a_stepped_over_step_is_marked_and_recorded_once(
    whole: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_back_once(monkeypatch, 3)
    run = create_run(tmp_path / "back", whole.recipe())
    assert worker.main([str(run.path), "--stop-at", "5"]) == 0
    rows, before = read_rows(run.samples), read_rows(whole.samples)
    assert len(rows) == 5 * BATCH
    marked = np.signbit(rows[:, 2])
    assert np.flatnonzero(marked).tolist() == [*range(3 * BATCH, 4 * BATCH)]
    np.testing.assert_array_equal(np.abs(rows[: 4 * BATCH, 2]), before[: 4 * BATCH, 2])
    found = look(run)
    assert (found.found.no_update, int(found.found.visits.sum())) == (BATCH, 4 * BATCH)
    assert any("made no update" in note for note in found.notes)


def test_a_branch_takes_its_parents_rows_where_the_order_is_the_same(
    whole: RunDir, tmp_path: Path
) -> None:
    checkpoint = find_checkpoint(whole, 4)
    recipes = {
        "same": whole.recipe(),
        "batch": change_recipe(whole.recipe(), ["global_batch=32", "duration=128 samples"]),
        "seed": change_recipe(whole.recipe(), ["seed=9"]),
    }
    plans = [plan_branch(whole, checkpoint, tmp_path / n, r) for n, r in recipes.items()]
    same, batch, seed = make_branches(whole, checkpoint, plans)
    for run in (same, batch):
        assert content(run) == content(whole)[: 4 * BATCH * 6]
    assert not seed.samples.exists()
    assert worker.main([str(same.path)]) == 0
    assert content(same) == content(whole)
    assert worker.main([str(seed.path), "--stop-at", "5"]) == 0
    found = look(seed).found
    assert (found.unrecorded, int(found.visits.sum())) == (4 * BATCH, BATCH)


def test_an_unreadable_sample_leaves_its_place_empty(
    whole: RunDir, digits: Path, tmp_path: Path
) -> None:
    data = tmp_path / "shards"
    shutil.copytree(digits, data)
    index = open_index(data / "train")
    bad = batches_of(whole)[1].samples[3]
    shard = data / "train" / index.shards[int(index.shard[bad])].name
    with shard.open("r+b") as file:
        file.seek(int(index.offset[bad]))
        file.write(b"no picture at all")
    run = create_run(tmp_path / "bad", change_recipe(whole.recipe(), [f"data.path={data}"]))
    assert worker.main([str(run.path), "--stop-at", "2"]) == 0
    rows = read_rows(run.samples)
    empty = np.flatnonzero((rows.view(np.uint16) == 0).all(1))
    assert empty.tolist() == [BATCH + 8 + 3]
    found = look(run)
    assert found.found.visits[bad] == 0
    assert any("1 of 32 positions have no record" in note for note in found.notes)


def test_the_command_says_and_writes_what_was_found(whole: RunDir, tmp_path: Path) -> None:
    out, weights = tmp_path / "out", tmp_path / "weights.csv"
    done = command(whole, "--out", str(out), "--weights", str(weights), "--drop", "0.01", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.output)
    looked = look(whole)
    assert result["visits"] == STEPS * BATCH
    assert result["weights"] == {"file": str(weights), "zero": round(0.01 * len(looked.index))}
    assert len(result["label_errors"]) == 12
    assert result["label_errors"][0]["margin"] == np.nanmin(looked.found.margin)
    assert json.loads((out / RESULT).read_text())["label_errors"] == result["label_errors"]
    table = pq.read_table(out / TABLE).to_pydict()
    assert table["key"] == looked.index.keys()
    assert table["key"][table["rank"].index(1)] == result["label_errors"][0]["key"]
    assert [m is None for m in table["margin"]] == (~looked.found.seen).tolist()
    for name in (ERRORS, MAP):
        assert Image.open(out / name).size > (100, 100)
    assert "label-errors.png" in (out / PAGE).read_text()
    read = read_weights(weights, looked.index)
    assert np.flatnonzero(read == 0).tolist() == sorted(
        looked.found.ranking()[: result["weights"]["zero"]].tolist()
    )
    plain = command(whole, "--until", "4", "--top", "3")
    assert (
        f"64 visits of 64 of {len(looked.index):,} samples, 1.0 each, up to step 4" in plain.output
    )
    first = look(whole, 4).found.ranking()[:3].tolist()
    shown = [line.split()[0] for line in plain.output.splitlines()[-3:]]
    assert shown == [looked.keys[i] for i in first]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--until", "9"], "up to step 8"),
        (["--drop", "0.5"], "name their file"),
        (["--weights", "w.txt", "--drop", "0.1"], "must end in"),
        (["--weights", "w.csv"], "say by --drop"),
        (["--weights", "w.csv", "--weigh", "ambiguous", "--drop", "0.5"], "--drop is of"),
    ],
)
def test_wrong_options_are_one_message(
    whole: RunDir, tmp_path: Path, options: list[str], why: str
) -> None:
    done = command(whole, *options)
    assert isinstance(done.exception, UserError)
    assert why in str(done.exception)
    inside = command(whole, "--out", str(whole.path / "out"))
    assert "only read" in str(inside.exception)
    there = command(whole, "--out", str(tmp_path))
    assert "exists already" in str(there.exception)
    kept = tmp_path / "data.parquet"
    kept.write_bytes(b"somebody's data")
    there = command(whole, "--weights", str(kept), "--weigh", "forgotten")
    assert "choose another --weights" in str(there.exception)
    assert kept.read_bytes() == b"somebody's data"


def test_other_data_is_refused(whole: RunDir, digits: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "moved")
    shutil.copytree(whole.path, run.path)
    state = sorted(run.checkpoints.iterdir())[-1] / "state.json"
    content = json.loads(state.read_text())
    content["fingerprint"]["order_hash"] = "0" * 16
    state.write_text(json.dumps(content))
    with pytest.raises(UserError, match="trained on other data"):
        look(run)


def test_mixed_images_and_a_stream_are_told_of(digits: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "mixed", digits, "augment.mixup=0.2", "duration=2 steps")
    (note,) = [note for note in look(run).notes if "mixed" in note]
    assert "augment.mixup=0" in note
    with pytest.raises(UserError, match=r"log\.samples does not go with data\.stream"):
        load_recipe("digits", [*SMALL, "data.stream=[a.tar]"])
