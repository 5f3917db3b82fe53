"""Ledgers of real runs: by ranks, over kills, and what diff and audit find of what was changed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import change_recipe, load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.index import build_index
from bigbatch.launcher.batches import batches
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.fork import find_checkpoint, make_branches, plan_branch
from bigbatch.launcher.start import agent_command
from bigbatch.trainers import worker
from bigbatch.trainers.ledger.compare import compare
from bigbatch.trainers.ledger.lines import FIRST, chained, read_ledger
from bigbatch.trainers.recovery.stored import measure, verify
from tests.helpers import warm
from tests.helpers.archives import alter
from tests.helpers.runs import go_back_once

STEPS = 6
SMALL = (
    "model={name: test_resnet, options: {drop_rate: 0.2}}",
    "data={workers: 0, threads: 1, image_size: 16}",
    "log={wandb: off, diagnosis: false, ledger_every: 1}",
    f"duration={STEPS} steps",
    "global_batch=16",
    "micro_batch=8",
    "schedule={name: constant}",
    "optimizer={name: sgd, lr: 0.1, momentum: 0.9}",
    "augment.mixup=0.2",
    "checkpoint={every: 2 steps, keep: 9}",
    f"evaluate={{every: {STEPS} steps, precise_bn_images: 64}}",
    "ensemble.soup=false",
)


@pytest.fixture(scope="module", autouse=True)
def no_end() -> Iterator[None]:
    """Runs end with their last step: nobody looks at their scores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigbatch.trainers.run.finish", lambda job, log: None)
        yield


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    recipe = load_recipe("digits", [f"data.path={digits}", *SMALL])
    run = create_run(tmp_path_factory.mktemp("runs") / "whole", recipe)
    assert worker.main([str(run.path)]) == 0
    return run


def copied(run: RunDir, path: Path) -> RunDir:
    shutil.copytree(run.path, path)
    return RunDir(path)


def step_lines(run: RunDir) -> list[str]:
    return [x for x in run.ledger.read_text().splitlines() if x.startswith('{"kind": "step"')]


def diff(a: RunDir, b: RunDir, *options: str) -> Result:
    found = CliRunner().invoke(cli, ["diff", str(a.path), str(b.path), "--ledgers", *options])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def audit(run: RunDir) -> tuple[int, list[str]]:
    found = CliRunner().invoke(cli, ["audit", str(run.path), "--json"])
    return found.exit_code, json.loads(found.output)["files"]["findings"]


def test_every_step_has_one_line_of_few_bytes(whole: RunDir) -> None:
    ledger = read_ledger(whole.ledger)
    assert ledger.broken is None
    assert list(ledger.steps) == [*range(1, STEPS + 1)]
    assert all(len(set(s.digests.values())) == 6 for s in ledger.steps.values())
    start = ledger.steps[1].start
    assert (start["world"], start["backend"]) == (1, "ddp")
    assert {"device", "torch", "cudnn", "threads", "isa", "tf32"} < start.keys()
    assert max(map(len, step_lines(whole))) < 256
    assert audit(whole) == (0, [])


@pytest.mark.slow
def test_two_ranks_write_the_same_lines(whole: RunDir, tmp_path: Path) -> None:
    run = create_run(tmp_path / "two", whole.recipe())
    done = warm.run(agent_command(run.path, 2, stop_at=4), capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert step_lines(run) == step_lines(whole)[:4]
    found = compare(whole, run)
    assert (found.status, found.compared, found.beyond) == (0, 4, {"A": 2, "B": 0})
    assert any("world = 1 in A, 2 in B" in note for note in found.notes)


def test_a_killed_run_goes_on_with_its_chain(whole: RunDir, tmp_path: Path) -> None:
    """As it lies there after SIGKILL: lines beyond the checkpoint, one of them torn."""
    run = copied(whole, tmp_path / "killed")
    for step in (4, 6):
        shutil.rmtree(run.checkpoints / f"step-0000000{step}")
    with run.ledger.open("a") as file:
        file.write(step_lines(whole)[0][:77])
    assert worker.main([str(run.path)]) == 0
    assert step_lines(run) == step_lines(whole)
    assert [s.start["step"] for s in read_ledger(run.ledger).steps.values()] == [0, 0, 2, 2, 2, 2]
    assert audit(run) == (0, [])
    assert diff(whole, run).exit_code == 0


def test_a_rollback_goes_on_with_the_chain(
    whole: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_back_once(monkeypatch, 3)
    run = create_run(tmp_path / "back", whole.recipe())
    assert worker.main([str(run.path), "--stop-at", "5"]) == 0
    ledger, other = read_ledger(run.ledger), read_ledger(whole.ledger)
    assert ledger.broken is None
    assert step_lines(run)[:3] == step_lines(whole)[:3]
    before, stepped_over = ledger.steps[3].digests, ledger.steps[4].digests
    assert all(before[name] == stepped_over[name] for name in ("weights", "optimizer", "buffers"))
    assert stepped_over["gradient"] == other.steps[4].digests["gradient"]
    assert list(ledger.steps) == [1, 2, 3, 4, 5]
    assert audit(run) == (0, [])


def test_a_rate_that_changes_is_named_as_the_update(whole: RunDir, tmp_path: Path) -> None:
    recipe = change_recipe(whole.recipe(), ["optimizer.lr=0.2", "log.ledger_every=2"])
    checkpoint = find_checkpoint(whole, 2)
    plan = plan_branch(whole, checkpoint, tmp_path / "faster", recipe)
    (run,) = make_branches(whole, checkpoint, [plan])
    assert worker.main([str(run.path), "--stop-at", "4"]) == 0
    shown = diff(whole, run)
    assert shown.exit_code == 1
    assert "optimizer.lr = 0.1 in A, 0.2 in B" in shown.output
    assert "step 4 differs first in: loss; step 2 is the same in all" in shown.output  # not of 3
    every = change_recipe(whole.recipe(), ["optimizer.lr=0.2"])
    plan = plan_branch(whole, checkpoint, tmp_path / "each", every)
    (run,) = make_branches(whole, checkpoint, [plan])
    assert worker.main([str(run.path), "--stop-at", "4"]) == 0
    found = json.loads(diff(whole, run, "--json").output)
    assert found["parting"]["step"] == 3
    assert found["parting"]["digests"] == ["weights"]  # momentum buffers take no rate in
    ledger = run.ledger.read_text()
    run.ledger.write_text(ledger.replace('"isa": "', '"isa": "other '))
    shown = diff(whole, run)
    assert shown.exit_code == 2
    assert "not comparable: step 3 differs, and so does what computed it" in shown.output
    run.ledger.write_text(ledger)
    picture = tmp_path / "both.svg"
    assert diff(whole, run, "--plot", str(picture)).exit_code == 1
    assert "the update" in diff(whole, run).output
    assert picture.stat().st_size > 1000


def test_a_sample_with_another_pixel_is_named(whole: RunDir, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "shards")
    drawn = [
        [k for b in batches(whole.recipe(), range(s, s + 1)) for k in b.keys] for s in (0, 1, 2)
    ]
    place, key = next((i, k) for i, k in enumerate(drawn[2]) if k not in drawn[0] + drawn[1])
    alter(tmp_path / "shards/train/000000.tar", key)
    build_index(tmp_path / "shards/train")
    recipe = change_recipe(whole.recipe(), [f"data.path={tmp_path / 'shards'}"])
    run = create_run(tmp_path / "altered", recipe)
    assert worker.main([str(run.path), "--stop-at", "3"]) == 0
    shown = diff(whole, run)
    assert shown.exit_code == 1
    assert "step 3 differs first in: keys; step 2 is the same in all" in shown.output
    assert f"place {place}: {key} has another file in A than in B" in shown.output
    assert "data: data_hash = " in shown.output


def changed_line(run: RunDir, step: int, key: str, value: object) -> None:
    """As somebody who writes the ledger anew from a step on, chain and all, would not."""
    lines = run.metrics.read_text().splitlines()
    for number, line in enumerate(lines):
        record = json.loads(line)
        if record["kind"] == "train" and record["step"] == step:
            lines[number] = json.dumps(record | {key: value})
    run.metrics.write_text("".join(f"{line}\n" for line in lines))


def test_an_edited_record_is_found(whole: RunDir, tmp_path: Path) -> None:
    run = copied(whole, tmp_path / "loss")
    changed_line(run, 3, "loss", 0.5)
    status, findings = audit(run)
    assert status == 1
    assert "step 3 has loss 0.5" in findings[0]
    assert "save of step 4: a record after step 2" in findings[1]
    other = copied(whole, tmp_path / "rate")
    changed_line(other, 5, "lr", 0.5)
    status, findings = audit(other)
    assert (status, len(findings)) == (1, 1)
    assert "save of step 6: a record after step 4" in findings[0]


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_tampered_checkpoint_with_a_new_manifest_is_found(
    whole: RunDir, tmp_path: Path, name: str
) -> None:
    run = copied(whole, tmp_path / name)
    folder = run.checkpoints / "step-00000004"
    path = folder / f"{name}.safetensors"
    tensors = load_file(path)
    last = sorted(tensors)[-1]
    words = tensors[last].reshape(-1).view(np.uint8)
    words[-1] ^= 1
    save_file(tensors, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name] = measure(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    verify(folder)
    status, findings = audit(run)
    assert (status, len(findings)) == (1, 1)
    assert str(path) in findings[0]


def test_other_environments_and_broken_ledgers_are_not_compared(
    whole: RunDir, tmp_path: Path
) -> None:
    run = copied(whole, tmp_path / "other")
    text = run.ledger.read_text()
    start = json.loads(text.splitlines()[0])
    threads = text.replace(f'"threads": {start["threads"]}', '"threads": 64')
    run.ledger.write_text(threads)
    shown = diff(whole, run)  # the same bits are the same, whoever computed them
    assert shown.exit_code == 0
    assert "environment: threads" in shown.output
    changed = threads.splitlines()
    where = next(i for i, line in enumerate(changed) if '"step", "step": 5' in line)
    run.ledger.write_text("".join(f"{line}\n" for line in changed[:where]))
    assert diff(whole, run).exit_code == 0  # as far as both go
    run.ledger.write_text(threads.replace(step_lines(whole)[4], step_lines(whole)[5]))
    shown = diff(whole, run)
    assert shown.exit_code == 2
    assert "does not hold" in shown.output
    assert audit(run)[0] == 1
    run.ledger.unlink()
    assert "keeps no ledger" in str(CliRunner().invoke(cli, ["audit", str(run.path)]).exception)
    shown = diff(run, whole)
    assert shown.exit_code == 2
    assert "data: not known without a step in both ledgers" in shown.output
    assert shown.output.splitlines()[-1].startswith(f"not comparable: {run.ledger} is not there: ")


def test_a_difference_before_a_broken_chain_is_not_compared(whole: RunDir, tmp_path: Path) -> None:
    run = copied(whole, tmp_path / "both")
    lines = step_lines(whole)
    first = json.loads(lines[0])
    del first["kind"], first["step"], first["chain"]
    other = chained(FIRST, 1, first | {"loss": "0" * 16})
    run.ledger.write_text(f"{json.dumps(other)}\n{lines[1]}\n")
    shown = diff(whole, run)
    assert shown.exit_code == 2
    assert "step 1 differs first in: loss" in shown.output
    assert f"bigbatch replay {whole.path} --step 1 looks into it" in shown.output


@pytest.mark.parametrize("content", [b"", b'{"kind": "start", "step": 0}\n', bytes(range(256))])
def test_a_ledger_without_a_step_passes_nothing(
    whole: RunDir, tmp_path: Path, content: bytes
) -> None:
    run = copied(whole, tmp_path / "empty")
    run.ledger.write_bytes(content)
    shown = CliRunner().invoke(cli, ["audit", str(run.path)])
    assert isinstance(shown.exception, UserError)
    assert "holds no step" in str(shown.exception)


def test_a_ledger_that_lost_its_end_is_noted(whole: RunDir, tmp_path: Path) -> None:
    run = copied(whole, tmp_path / "short")
    run.ledger.write_text("".join(f"{line}\n" for line in step_lines(whole)[:3]))
    shown = CliRunner().invoke(cli, ["audit", str(run.path)])
    assert shown.exit_code == 0
    assert "note: metrics.jsonl goes on to step 6, the ledger to step 3" in shown.output


def test_records_of_no_form_end_no_audit(whole: RunDir, tmp_path: Path) -> None:
    run = copied(whole, tmp_path / "odd")
    big = "1" + "0" * 400
    with run.metrics.open("a") as file:
        for step, loss in (("[1]", "1.0"), ("{}", "1.0"), ('"3"', "1.0"), ("3", big)):
            file.write(f'{{"kind": "train", "step": {step}, "loss": {loss}}}\n')
    status, findings = audit(run)
    assert (status, len(findings)) == (1, 1)
    assert "step 3 has loss 1000" in findings[0]
    assert len(findings[0]) < 400


def test_a_branch_with_another_optimizer_passes(whole: RunDir, tmp_path: Path) -> None:
    """Its first checkpoint has none of the state that its parent's line is of."""
    recipe = change_recipe(whole.recipe(), ["optimizer={name: lamb, lr: 0.01}"])
    checkpoint = find_checkpoint(whole, 2)
    plan = plan_branch(whole, checkpoint, tmp_path / "lamb", recipe)
    (run,) = make_branches(whole, checkpoint, [plan])
    assert audit(run) == (0, [])
    assert list(read_ledger(run.ledger).steps) == [1, 2]


def test_a_checkpoint_that_goes_away_meanwhile_is_no_finding(
    whole: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(whole, tmp_path / "going")

    def removed(path: Path) -> None:
        if path.name == "step-00000002":
            shutil.rmtree(path)
        verify(path)

    monkeypatch.setattr("bigbatch.trainers.ledger.audit.verify", removed)
    shown = CliRunner().invoke(cli, ["audit", str(run.path)])
    assert shown.exit_code == 0
    assert "step-00000002 is not checked: the run, which goes on, has removed it" in shown.output
