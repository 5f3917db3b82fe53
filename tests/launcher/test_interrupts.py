"""Ctrl-C ends a command without a traceback, whatever it is at."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigbatch.trainers.compress import __main__ as compressing
from bigbatch.trainers.export import __main__ as exporting
from bigbatch.trainers.recovery.signals import Stopped

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


@pytest.mark.parametrize("command", [compressing, exporting], ids=["compress", "export"])
def test_at_work(
    command: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object) -> None:
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(command, "run", stop)
    monkeypatch.setattr(command, "_only_member", stop, raising=False)
    out = ["--out", str(tmp_path / "out.onnx"), "--method", "int8"]
    given = [os.fspath(tmp_path), *out[: 2 if command is exporting else 4]]
    assert command.main(given) == 130  # type: ignore[attr-defined]
    assert not capsys.readouterr().err
