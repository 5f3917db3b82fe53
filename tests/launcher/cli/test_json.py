"""--json of commands that do something: one object on standard output, all else beside it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.runs import registry
from tests.trainers.report.test_report import make_run

BECOME = """
import os, sys
from pathlib import Path
from bigbatch.launcher.cli.result import report_run
report_run(Path(sys.argv[1]))
print("talk", flush=True)
os.execvp(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""


def become(run: Path, code: str) -> subprocess.Popen[str]:
    """A command with --json whose run is a process of this code."""
    command = [sys.executable, "-c", BECOME, str(run), code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def ask(*arguments: str | Path) -> dict[str, object]:
    done = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_run_talks_on_stderr_and_its_standing_is_the_only_output(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    process = become(run.path, "print('step 1'); raise SystemExit(3)")
    out, err = process.communicate(timeout=60)
    found = json.loads(out)
    assert (process.returncode, found["exit_status"], found["state"]) == (3, 3, "finished")
    assert (found["path"], found["step"]) == (str(run.path), 300)
    assert found["summary"]["test"]["ensemble"]["accuracy"] == 0.983
    assert err == "talk\nstep 1\n"


def test_a_signal_reaches_the_run_and_its_status_comes_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", steps=50, finished=False)
    waits = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = become(run.path, waits)
    assert process.stderr is not None
    while process.stderr.readline() != "ready\n":
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)["exit_status"]) == (75, 75)


def test_of_a_finished_run_train_and_resume_say_where_it_stands(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    assert ask("resume", run.path, "--json")["state"] == "finished"


def test_one_of_several_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "digits")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29400")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        with pytest.raises(UserError, match="--json is for a run that this command starts"):
            ask("resume", run.path, "--json")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_rm(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name).path for name in ("a", "b")]
    assert ask("rm", *paths, "--yes", "--json") == {"removed": list(map(str, paths))}
    assert not any(path.exists() for path in paths)


def test_cancel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "a")
    monkeypatch.setattr(registry, "cancel", lambda run: "process 1 finishes its step")
    done = "process 1 finishes its step"
    assert ask("cancel", run.path, "--json") == {"run": str(run.path), "done": done}


def test_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / name).path for name in ("a", "b")]

    def send(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, int(command[-1].endswith("b")))

    monkeypatch.setattr(subprocess, "run", send)
    done = CliRunner().invoke(cli, ["sync", *map(str, runs), "--json"])
    sent = [{"run": str(runs[0]), "sent": True}, {"run": str(runs[1]), "sent": False}]
    assert (done.exit_code, json.loads(done.stdout)) == (1, {"runs": sent})
