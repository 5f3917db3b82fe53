"""Runs that the tests of a replay share: each is made once, and only read from then on."""

import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.start import agent_command
from bigbatch.trainers import worker
from bigbatch.trainers.recovery.rollback import read_rollbacks
from tests.helpers import warm


def small(digits: Path, *changes: str) -> list[str]:
    """Few small steps of the digits recipe, with its mixup, dropout and BatchNorm."""
    return [
        *(f"data.path={digits}", "log.wandb=off", "data.workers=0", "data.threads=1"),
        *("data.image_size=16", "global_batch=16", "micro_batch=4", "duration=20 steps"),
        *("schedule={name: constant}", "checkpoint.every=3 steps", "checkpoint.keep=20"),
        *("evaluate.every=6 steps", "evaluate.precise_bn_images=64", "log.ledger_every=1"),
        *changes,
    ]


def train_here(run: RunDir, stop_at: int) -> int:
    """One rank, in this process, with one thread as the ranks of tests have."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return worker.main([str(run.path), "--stop-at", str(stop_at)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def preempted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Seven steps: four on two ranks, and after a preemption three on one."""
    recipe = load_recipe("digits", small(digits))
    run = create_run(tmp_path_factory.mktemp("runs") / "preempted", recipe)
    done = warm.run(agent_command(run.path, 2, stop_at=4), capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert train_here(run, 7) == 0
    return run


@pytest.fixture(scope="session")
def rolled_back(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that went back from losses which leap, more than once."""
    changes = small(
        digits,
        *("optimizer.lr=30", "recovery.max_rollbacks=50", "recovery.skip_steps=2"),
        *("recovery.spike={factor: 1.02, deviations: 1, window: 5}", "evaluate.every=50 steps"),
        *("log.diagnosis=false", "duration=60 steps"),
    )
    run = create_run(tmp_path_factory.mktemp("runs") / "back", load_recipe("digits", changes))
    assert train_here(run, 12) == 0
    assert read_rollbacks(run)
    return run


def digest(run: RunDir) -> dict[str, str]:
    """Each file below a run's directory, with its SHA-256 and when it was changed."""
    return {
        str(path): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {os.stat(path).st_mtime_ns}"
        for path in sorted(run.path.rglob("*"))
        if path.is_file()
    }


def copied(run: RunDir, folder: Path) -> RunDir:
    shutil.copytree(run.path, folder / run.name)
    return RunDir(folder / run.name)


@contextmanager
def untouched(run: RunDir) -> Iterator[None]:
    """Fails where a file of the run comes, goes or changes inside."""
    before = digest(run)
    yield
    assert digest(run) == before
