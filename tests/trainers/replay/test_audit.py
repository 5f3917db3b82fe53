"""That an honest run passes an audit which computes it again, and that what was changed is found,
and where."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.rundir import RunDir
from bigbatch.data.index import build_index, open_index
from bigbatch.launcher.batches import batches
from bigbatch.trainers import loop
from bigbatch.trainers.planning.inputs import open_inputs
from bigbatch.trainers.recovery.stored import list_checkpoints, measure, verify
from bigbatch.trainers.replay.__main__ import main
from bigbatch.trainers.replay.intervals import Interval, draw, identity, intervals
from bigbatch.trainers.replay.recompute import audit_again, recompute
from tests.helpers.archives import rewrite
from tests.trainers.replay.conftest import copied, train_here, untouched

SLOW = pytest.mark.slow
Certificate = dict[str, Any]


def audited(run: RunDir, fraction: float = 1.0, seed: int = 0) -> Certificate:
    with untouched(run):
        return audit_again(run, fraction, seed)[1]


def outcomes(found: Certificate) -> dict[tuple[int, int], str]:
    own = found["intervals"]["recomputed"]
    return {(one["first"], one["last"]): one["outcome"] for one in own}


def findings(found: Certificate, first: int) -> list[str]:
    own = found["intervals"]["recomputed"]
    return next(one["findings"] for one in own if one["first"] == first)


HONEST = {(0, 3): "same", (3, 4): "same", (4, 6): "same", (6, 7): "same"}


def test_an_honest_run_of_two_ranks_and_one_passes(
    preempted: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over a preemption; its certificate says what was computed again, and what it is worth."""
    out = tmp_path / "audit.json"
    with untouched(preempted):
        options = ["--fraction", "1", "--seed", "5", "--out", str(out)]
        assert main(["audit", str(preempted.path), *options]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "passed"
    assert "recomputed steps 5 to 6: the same, bit for bit" in said.out
    assert "audit of preempted 7/7" in said.err
    found = json.loads(out.read_text())
    assert found["verdict"] == "passed"
    assert outcomes(found) == HONEST
    own = found["intervals"]
    assert (own["total"], own["steps"], own["recomputed_steps"]) == (4, 7, 7)
    assert all(one["checkpoint"] for one in own["recomputed"])
    assert [one["lines"] for one in own["recomputed"]] == [3, 1, 2, 1]
    assert all(one["values"] >= 9 * (one["last"] - one["first"]) for one in own["recomputed"])
    assert found["draw"]["seed"] == 5
    assert found["detection"] == {"1": 1.0, "2": 1.0}
    for words in ("4 of 4 intervals", "bit for bit", "does not show that the training was honest"):
        assert words in found["paragraph"]
    last = read_jsonl(preempted.ledger)
    assert found["ledger"]["chain"] == [x["chain"] for x in last if x["kind"] == "step"][-1]


@SLOW
def test_a_run_that_went_back_passes(rolled_back: RunDir) -> None:
    found = audited(rolled_back)
    assert found["verdict"] == "passed"
    assert found["intervals"]["recomputed_steps"] == 12


def flip(path: Path, pick: Callable[[dict[str, Any]], str]) -> str:
    """Another bit in one value of a checkpoint's file, which its manifest then has."""
    tensors = load_file(path)
    name = pick(tensors)
    # A sign, in the middle of a kernel of 3 by 3: corners of it may meet nothing but padding.
    tensors[name].reshape(-1)[4:5].view(np.uint8)[-1] ^= 0x80
    save_file(tensors, path)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name] = measure(path)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    verify(path.parent)
    return name


@pytest.mark.parametrize("file", ["model", pytest.param("optimizer", marks=SLOW)])
def test_a_tampered_checkpoint_and_an_edited_record_fail_where_they_are(
    preempted: RunDir, tmp_path: Path, file: str
) -> None:
    run = copied(preempted, tmp_path)
    path = run.checkpoints / "step-00000004" / f"{file}.safetensors"
    name = flip(path, lambda tensors: next(n for n in sorted(tensors) if "conv" in n))
    lines = run.metrics.read_text().splitlines()
    for number, line in enumerate(lines):
        record = json.loads(line)
        if record["kind"] == "train" and record["step"] == 7:
            lines[number] = json.dumps(record | {"grad_norm": 0.125})
    run.metrics.write_text("".join(f"{line}\n" for line in lines))
    found = audited(run)
    assert found["verdict"] == "failed"
    assert len(found["files"]["findings"]) == 2
    assert outcomes(found) == {(0, 3): "same"} | dict.fromkeys([(3, 4), (4, 6), (6, 7)], "differs")
    (at_end,) = findings(found, 3)
    assert at_end.startswith("checkpoint after step 4: 1 tensor or value not as recomputed: ")
    assert name in at_end
    assert findings(found, 4)[0].startswith("step 5: ")
    (edited,) = findings(found, 6)
    assert edited.startswith("step 7: grad_norm recorded 0.125, recomputed ")


@pytest.fixture(scope="module")
def cheated(preempted: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Whose fifth step was made with twice the rate, of which its records say nothing."""
    run = copied(preempted, tmp_path_factory.mktemp("cheated"))
    for step in (6, 7):
        shutil.rmtree(run.checkpoints / f"step-{step:08d}")
    steps = iter(range(4, 99))

    def set_lr(optimizer: Any, multiplier: float) -> None:
        honest(optimizer, multiplier * 2 if next(steps) == 4 else multiplier)

    honest = loop.set_lr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigbatch.trainers.loop.set_lr", set_lr)
        assert train_here(run, 7) == 0
    return run


def test_a_step_with_another_rate_fails_though_all_files_agree(cheated: RunDir) -> None:
    found = audited(cheated)
    assert found["files"]["passed"]
    assert found["verdict"] == "failed"
    assert outcomes(found) == HONEST | {(4, 6): "differs"}
    where = findings(found, 4)
    assert where[0].startswith("step 5: weights in the ledger recorded ")
    assert not any("loss" in line or "gradient" in line for line in where[:2])


@SLOW
def test_it_is_found_where_its_interval_is_drawn(cheated: RunDir) -> None:
    """As `detection` says: the draw alone decides."""
    every = intervals(cheated, {})
    name = identity(cheated)
    met = [any(one.first == 4 for one in draw(every, 0.25, name, seed)) for seed in range(40)]
    for seed in (met.index(True), met.index(False)):
        found = audited(cheated, 0.25, seed)
        assert found["intervals"]["recomputed_steps"] <= 3
        assert found["verdict"] == ("failed" if met[seed] else "passed")
        assert found["detection"]["1"] == 0.25


@pytest.fixture
def elsewhere(preempted: RunDir, digits: Path, tmp_path: Path) -> tuple[RunDir, Path]:
    """A copy of the run, and the shards that it was trained on, which may be changed."""
    run = copied(preempted, tmp_path / "runs")
    shards = tmp_path / "shards"
    shutil.copytree(digits, shards)
    text = run.recipe_file.read_text()
    run.recipe_file.write_text(text.replace(str(digits), str(shards)))
    return run, shards / "train"


def samples_of(run: RunDir, step: int) -> list[int]:
    return [s for b in batches(run.recipe(), range(step - 1, step)) for s in b.samples]


@SLOW
def test_shards_in_another_place_are_the_same_shards(elsewhere: tuple[RunDir, Path]) -> None:
    assert audited(elsewhere[0])["verdict"] == "passed"


def test_a_shard_with_other_images_fails_where_they_are_seen(
    elsewhere: tuple[RunDir, Path],
) -> None:
    """Of the same size: one image is written over another one."""
    run, train = elsewhere
    index = open_index(train)
    ends = {0, len(index) - 1}  # which are looked at whenever shards are opened
    sample = next(s for s in samples_of(run, 6) if s not in ends | set(samples_of(run, 5)))
    path = train / index.shards[int(index.shard[sample])].name
    offset, size = int(index.offset[sample]), int(index.size[sample])
    content = bytearray(path.read_bytes())
    content[offset + size // 2 : offset + size] = bytes(size - size // 2)
    path.write_bytes(content)
    found = audited(run)
    assert found["verdict"] == "failed"
    assert outcomes(found)[4, 6] == "differs"
    said = findings(found, 4)
    assert said[0] == (
        f"step 6: {path.name} at byte {offset:,}: the bytes differ from the index (CRC-32C)"
    )
    assert any(line.startswith("step 6: keys in the ledger recorded") for line in said)
    # Another shard altogether.
    path.write_bytes(path.read_bytes()[::-1])
    found = audited(run, 0.25)
    assert found["verdict"] == "failed"
    (interval,) = found["intervals"]["recomputed"]
    assert f"shard {path}" in interval["findings"][0]
    path.unlink()
    with pytest.raises(UserError, match="restore it, or run `bigbatch index"):
        audit_again(run, 0.25, 0)


@SLOW
def test_a_changed_label_fails(elsewhere: tuple[RunDir, Path]) -> None:
    run, train = elsewhere
    index = open_index(train)
    sample = next(s for s in samples_of(run, 6) if s not in samples_of(run, 5))
    key = index.keys()[sample]
    shard = train / index.shards[int(index.shard[sample])].name
    rewrite(shard, f"{key}.cls", lambda label: str((int(label) + 1) % 10).encode())
    build_index(train)
    found = audited(run)
    assert found["verdict"] == "failed"
    assert set(outcomes(found).values()) == {"differs"}
    assert all("was trained on other data: its order_hash is" in f for f in findings(found, 3))
    # Whoever also writes that hash into every checkpoint is given away by the steps.
    forge(run)
    found = audited(run)
    assert found["files"]["passed"]
    assert found["verdict"] == "failed"
    wrong = [x for x in found["intervals"]["recomputed"] if x["outcome"] == "differs"]
    for one in wrong:
        assert any("keys in the ledger recorded" in line for line in one["findings"])


def forge(run: RunDir) -> None:
    order = open_inputs(run.recipe()).order
    assert order is not None
    for folder in list_checkpoints(run.checkpoints):
        path = folder / "state.json"
        state = json.loads(path.read_text())
        state["fingerprint"]["order_hash"] = order.hash
        path.write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["state.json"] = measure(path)
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_another_machine_is_not_comparable_and_no_tolerance_makes_it_so(
    cheated: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(cheated, tmp_path)
    text = run.ledger.read_text().replace('"isa": "', '"isa": "other ')
    run.ledger.write_text(text)
    assert main(["audit", str(run.path), "--fraction", "1", "--seed", "0", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "not comparable"
    assert outcomes(found) == HONEST | {(4, 6): "not comparable"}
    (wrong,) = [x for x in found["intervals"]["recomputed"] if x["outcome"] != "same"]
    assert wrong["reasons"][0].startswith('isa = "other ')
    assert "Not comparable: steps 5 to 6." in found["paragraph"]


def test_what_nothing_is_on_record_of_does_not_pass(preempted: RunDir, tmp_path: Path) -> None:
    """Of the last steps neither records nor a checkpoint are left, and one line of the ledger."""
    run = copied(preempted, tmp_path)
    for step in (3, 4, 6, 7):
        shutil.rmtree(run.checkpoints / f"step-{step:08d}")
    lines = [line for line in run.metrics.read_text().splitlines() if '"step": 7' in line]
    run.metrics.write_text("".join(f"{line}\n" for line in lines if '"train"' in line))
    found = recompute(run, Interval(0, 1), {}, lambda: None)
    assert (found.outcome, found.values) == ("same", 6)  # of the ledger
    run.ledger.unlink()
    found = recompute(run, Interval(0, 1), {}, lambda: None)
    assert (found.outcome, found.values) == ("not comparable", 0)
    assert found.reasons == ("nothing of it is on record to compare with",)


def test_what_cannot_be_audited_is_said(preempted: RunDir, tmp_path: Path) -> None:
    run = copied(preempted, tmp_path)
    for path in list_checkpoints(run.checkpoints):
        shutil.rmtree(path)
    manifest = json.loads(run.manifest.read_text())
    origin = {"run": "runs/parent", "step": 3, "at": 3}
    run.manifest.write_text(json.dumps(manifest | {"forked_from": origin}))
    with pytest.raises(UserError, match="no step that can be computed again"):
        audit_again(run, 1.0, 0)
    run.recipe_file.write_text(
        preempted.recipe_file.read_text().replace(preempted.recipe().data.path, "nowhere")
    )
    run.manifest.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="nowhere is no folder here"):
        audit_again(run, 1.0, 0)
