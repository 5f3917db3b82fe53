"""The order of a run's end: figures, the report, and last what makes it a finished one."""

from pathlib import Path
from typing import Any

import pytest

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.trainers import finish
from bigbatch.trainers.monitoring import history
from bigbatch.trainers.monitoring.log import open_log
from bigbatch.trainers.report import report

SCORES = {"accuracy": 0.9876, "nll": 0.05, "ece": 0.01}
SUMMARY = {"val": {"members": [{"name": "cycle-01", **SCORES}], "ensemble": SCORES}}


def test_a_run_is_finished_only_when_its_report_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill in between left a finished run without report, which no start looked at again."""
    run = create_run(tmp_path / "run", load_recipe("digits", ["log.wandb=off"]))
    there = []

    def killed(run: RunDir, summary: dict[str, Any]) -> Path:
        there.extend([run.summary.exists(), run.events.exists(), capsys.readouterr().out])
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_report", killed)
    with pytest.raises(KeyboardInterrupt):
        end(run)
    summary_there, _, said = there
    assert not summary_there
    assert not run.summary.exists()
    assert "98.76%" in said  # the figures are said before the report takes its seconds
    assert read_jsonl(run.events)[-1]["state"] == "failed"  # and is gone on with
    monkeypatch.undo()
    end(run)
    page = run.report.read_text()
    assert 'class="state finished"' in page
    assert "98.76%" in page
    assert run.summary.exists()
    assert read_jsonl(run.events)[-1]["state"] == "finished"


def test_a_report_that_cannot_be_drawn_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(tmp_path / "run", load_recipe("digits", ["log.wandb=off"]))

    def broken(run: RunDir, summary: dict[str, Any]) -> Path:
        raise ZeroDivisionError

    monkeypatch.setattr(report, "write_report", broken)
    end(run)
    assert f"`bigbatch report {run.path}` writes it" in capsys.readouterr().err
    assert read_jsonl(run.events)[-1]["state"] == "finished"


def test_records_are_read_once_and_words_that_fail_end_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_plots: None,
) -> None:
    """They were read again behind the summary, where an error ended a run that was finished."""
    run = create_run(tmp_path / "{of: me}" / "run", load_recipe("digits", ["log.wandb=off"]))
    read: list[Path] = []
    real = history.read_records

    def counted(path: Path) -> Any:
        read.append(path)
        return real(path)

    def broken(findings: Any, console: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(history, "read_records", counted)
    monkeypatch.setattr(finish, "say_findings", broken)
    end(run)
    assert read == [run.metrics]
    said = capsys.readouterr().err
    assert f"no diagnosis: ZeroDivisionError; `bigbatch diagnose {run.path}` says it" in said
    assert read_jsonl(run.events)[-1]["state"] == "finished"


def test_no_report_is_drawn_where_none_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(tmp_path / "run", load_recipe("digits", ["log={wandb: off, report: false}"]))
    end(run)
    said = capsys.readouterr()
    assert "98.76%" in said.out
    assert "Too early to tell" in said.out  # what the diagnosis has to say
    assert not any(line.startswith("report") for line in said.out.splitlines())
    assert "no report" not in said.err
    assert run.summary.exists()
    assert not run.report.exists()
    assert read_jsonl(run.events)[-1]["state"] == "finished"


def end(run: RunDir) -> None:
    with open_log(run, run.recipe(), rank=0, total_steps=9, start_step=9, epoch_samples=9) as log:
        finish.end(run, SUMMARY, log, run.recipe().log.report)
