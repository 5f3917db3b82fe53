"""A disk that takes nothing more: one message, and nothing of what was saved is lost."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.cli import main
from bigbatch.launcher.start import agent_command
from bigbatch.trainers import worker
from bigbatch.trainers.recovery.stored import list_checkpoints
from tests.helpers import warm

RESULTS = ("ensemble/members.json", "ensemble/confusion.json", "report.html", "summary.json")


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> RunDir:
    """A run of one step, with one snapshot."""
    changes = ["duration=1 steps", "schedule={name: cosine}", "global_batch=8", "micro_batch=4"]
    changes += [f"data.path={digits}", "data.image_size=16", "data.workers=0", "log.wandb=off"]
    return create_run(tmp_path / "run", load_recipe("digits", changes))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the disk be full whenever a file whose path holds one of some texts is put onto it."""
    places: tuple[str, ...] = ()
    fsync = os.fsync

    def refuse(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if any(place in path for place in places):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    def fill(*texts: str) -> None:
        nonlocal places
        places = texts

    monkeypatch.setattr(os, "fsync", refuse)
    return fill


@pytest.mark.usefixtures("no_plots")
def test_wherever_the_end_of_a_run_meets_it(
    run: RunDir,
    full: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each start goes on where the one before it stopped, and comes further.
    for number, (names, written) in enumerate(
        ((("augmented", "cycle-01"), 0), (("confusion",), 1), (("report",), 2))
    ):
        full(*names)
        assert worker.main([str(run.path)]) == 2
        said = capfd.readouterr().err
        assert "Traceback" not in said
        assert said.count("No space left on device") == 1
        assert f"`bigbatch resume {run.path}`" in said
        assert len(list_checkpoints(run.checkpoints)) == min(number, 1)
        done = [(run.path / result).exists() for result in RESULTS]
        assert done == [n < written for n in range(len(RESULTS))]
        assert run.contact_sheet.exists() == (number > 0)
    monkeypatch.setattr(sys, "argv", ["bigbatch", "report", str(run.path)])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert "No space left on device" in capfd.readouterr().err
    full()
    assert worker.main([str(run.path)]) == 0
    assert all((run.path / result).exists() for result in RESULTS)
    ends = [e["state"] for e in read_jsonl(run.events) if e["kind"] == "end"]
    assert ends == ["failed", "failed", "failed", "finished"]
    assert not list(run.path.glob("**/.*.tmp-*"))


@pytest.mark.slow
def test_the_kernel_s_own_refusal_with_two_ranks(run: RunDir) -> None:
    command = agent_command(run.path, 2)

    def refused() -> None:
        """All ranks learn why: the second one waited for the first, and said that it lost it."""
        done = subprocess.run(
            ["prlimit", "--fsize=600", *command],
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "lost another rank" not in done.stderr
        assert f"`bigbatch resume {run.path}`" in done.stderr
        assert not run.summary.exists()

    refused()
    assert not list(run.snapshots.glob("*"))
    assert warm.run(command, timeout=200).returncode == 0
    for result in RESULTS:
        (run.path / result).unlink()
    refused()
    assert warm.run(command, timeout=200).returncode == 0
    assert all((run.path / result).exists() for result in RESULTS)
