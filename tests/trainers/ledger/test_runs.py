"""Ledgers of real runs: by ranks, and over kills."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.start import agent_command
from bigbatch.trainers import worker
from bigbatch.trainers.ledger.lines import read_ledger
from tests.helpers import warm

STEPS = 6
SMALL = (
    "model={name: test_resnet, options: {drop_rate: 0.2}}",
    "data={workers: 0, threads: 1, image_size: 16}",
    "log={wandb: off, diagnosis: false}",
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


def test_every_step_has_one_line_of_few_bytes(whole: RunDir) -> None:
    ledger = read_ledger(whole.ledger)
    assert ledger.broken is None
    assert list(ledger.steps) == [*range(1, STEPS + 1)]
    assert all(len(set(s.digests.values())) == 6 for s in ledger.steps.values())
    start = ledger.steps[1].start
    assert (start["world"], start["backend"]) == (1, "ddp")
    assert {"device", "torch", "cudnn", "threads", "isa", "tf32"} < start.keys()
    assert max(map(len, step_lines(whole))) < 256


def test_two_ranks_write_the_same_lines(whole: RunDir, tmp_path: Path) -> None:
    run = create_run(tmp_path / "two", whole.recipe())
    done = warm.run(agent_command(run.path, 2, stop_at=4), capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert step_lines(run) == step_lines(whole)[:4]


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
