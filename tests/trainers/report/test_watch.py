"""The live view: what it shows of a run at any moment, and when it ends."""

import io
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.runs.registry import ENDED, state_of
from bigbatch.trainers.monitoring.history import read_history
from bigbatch.trainers.report.watch import picture, seconds_left, watch
from tests.trainers.report.test_report import make_run


def watched(run: RunDir, width: int = 120, terminal: bool = False) -> str:
    text = io.StringIO()
    console = Console(file=text, width=width, height=40, force_terminal=terminal)

    def ended() -> str | None:
        state = state_of(run)
        return state if state in ENDED else None

    watch(run, ended=ended, interval=0.05, console=console)
    return text.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_picture_fits_the_terminal(tmp_path: Path, width: int) -> None:
    text = watched(make_run(tmp_path / "digits"), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for part in (
        "digits  finished",
        "loss",
        "learning rate",
        "images per second",
        "signal 15",
        "model 60%",
    ):
        assert part in text


@pytest.mark.parametrize("steps", [0, 1, 2, 50])
def test_unfinished_runs_have_a_picture(tmp_path: Path, steps: int) -> None:
    text = watched(make_run(tmp_path / "digits", steps=steps, finished=False))
    assert f"{steps}/300" in text
    assert "running" in text


def test_a_bare_run_directory_and_none(tmp_path: Path) -> None:
    assert "not started" in watched(create_run(tmp_path / "bare", load_recipe("digits")))
    with pytest.raises(UserError, match="no run directory"):
        watched(RunDir(tmp_path))


def test_names_with_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits")
    with run.events.open("a") as file:
        print(json.dumps({"kind": "[bold]evil[/]", "note": "[/red]"}), file=file)
    assert "[bold]evil[/]" in watched(run)


def test_it_follows_until_the_run_ends(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", steps=100, finished=False)

    def go_on() -> None:
        time.sleep(0.3)
        with run.metrics.open("a") as file:
            print(json.dumps({"kind": "train", "step": 300, "loss": 0.125, "lr": 0.0}), file=file)
        with run.events.open("a") as file:
            print(json.dumps({"kind": "end", "step": 300, "state": "finished"}), file=file)

    thread = threading.Thread(target=go_on)
    thread.start()
    text = watched(run, terminal=True)
    thread.join()
    assert text.index("100/300") < text.index("300/300")
    assert "finished" in text


def test_it_ends_when_a_run_was_killed(tmp_path: Path) -> None:
    """Of a killed run the files say no more than that it started."""
    run = make_run(tmp_path / "digits", steps=100, finished=False)
    event = {"kind": "start", "step": 100, "host": socket.gethostname(), "pid": os.getpid()}
    with run.events.open("a") as file:
        print(json.dumps(event), file=file)
    assert "digits  killed" in Text.from_ansi(watched(run, terminal=True)).plain


def test_a_stopped_run_is_followed_since_it_may_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", steps=100, finished=False)
    with run.events.open("a") as file:
        print(json.dumps({"kind": "end", "step": 100, "state": "stopped"}), file=file)
    states = iter(["stopped", "stopped", None, "finished"])
    text = io.StringIO()
    console = Console(file=text, width=120, height=40, force_terminal=True)
    watch(run, ended=lambda: next(states), interval=0.001, console=console)
    assert list(states) == []  # it looked until the end
    shown = Text.from_ansi(text.getvalue()).plain
    assert "digits  stopped  waiting for it to go on; Ctrl-C leaves" in shown
    assert "digits  finished" in shown
    assert "digits  stopped" in watched(run)  # without a terminal, one picture


@pytest.mark.parametrize("size", [(80, 24), (60, 24), (100, 30), (200, 50)])
def test_events_and_alerts_stay_in_sight(tmp_path: Path, size: tuple[int, int]) -> None:
    run = make_run(tmp_path / "digits", steps=220, finished=False)
    kinds = [{"kind": "spike", "step": 30, "loss": 9.0}]
    kinds += [{"kind": "signal", "step": step, "note": "x" * 300} for step in range(40, 60)]
    with run.events.open("a") as file:
        for event in kinds:
            print(json.dumps({"date": "2025-06-15T14:00:00+0000", **event}), file=file)
    width, height = size
    history = read_history(run)
    console = Console(file=io.StringIO(), width=width, height=height)
    lines = console.render_lines(picture(run, history, width, height))
    assert len(lines) < height
    text = "\n".join("".join(part.text for part in line) for line in lines)
    assert "spike" in text
    assert [f"step {step}" in text for step in (58, 59)] == [True, True]
    for title in ("loss", "accuracy") if width > 60 else ("loss",):
        assert title in text


def test_time_left_is_the_pace_since_the_newest_start(tmp_path: Path) -> None:
    run = make_run(tmp_path / "digits", steps=220, finished=False)
    now = time.time()
    events = [
        {"kind": "start", "time": now - 9999, "step": 0, "total_steps": 300},
        {"kind": "start", "time": now - 60, "step": 120, "total_steps": 300},
    ]
    run.events.write_text("".join(json.dumps(e) + "\n" for e in events))
    # 100 steps in the 50 s before the last record, which is 10 s old; 80 steps are left.
    left = seconds_left(read_history(run), age=10.0)
    assert left == pytest.approx(40, rel=0.02)
