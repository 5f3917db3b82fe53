"""Ctrl-C ends a command without a traceback while it imports, and while it works."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from bigbatch.launcher.cli.main import cli
from bigbatch.trainers.recovery.signals import until_stopped

MODULES = ("compress", "export", "inference", "replay")


@pytest.mark.parametrize("name", MODULES)
def test_while_it_imports(name: str, tmp_path: Path) -> None:
    given = {
        "compress": ["run", "--method", "int8", "--out", "small"],
        "export": ["run", "--out", "model.onnx"],
        "inference": ["evaluate", "run", "--source", "shards"],
        "replay": ["step", "run", "--step", "1"],
    }
    (tmp_path / "run").mkdir()  # whatever looks at a model imports what models need
    command = [sys.executable, "-m", f"bigbatch.trainers.{name}", *given[name]]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in maps.read_text() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert not said


def test_one_that_ignores_it_goes_on(tmp_path: Path) -> None:
    """As a shell's script lets commands that end in & do."""
    command = [sys.executable, "-m", "bigbatch.trainers.replay", "step", "run", "--step", "1"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "run" in said


def test_at_work(tmp_path: Path) -> None:
    """What is temporary is removed on the way out, and nothing is said."""

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            (tmp_path / "tidy").touch()
        return 0

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert until_stopped(work) == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / "tidy").exists()


def test_a_command_that_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not 1, which is what `check` and `diff` answer."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bigbatch.configs.load.builtin_recipes", interrupted)
    done = CliRunner().invoke(cli, ["recipes"])
    assert done.exit_code == 130
    assert done.stderr == "interrupted\n"
