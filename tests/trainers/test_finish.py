"""The order of a run's end: figures first, then what takes time."""

from pathlib import Path

import pytest

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.trainers.finish import say_results
from bigbatch.trainers.monitoring.log import open_log
from bigbatch.trainers.report import report

SCORES = {"accuracy": 0.9876, "nll": 0.05, "ece": 0.01}
SUMMARY = {"val": {"members": [{"name": "cycle-01", **SCORES}], "ensemble": SCORES}}


def test_the_table_is_said_before_the_report_is_drawn_and_the_log_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(tmp_path / "run", load_recipe("digits", ["log.wandb=off"]))
    said_before = []

    def refused(run: RunDir) -> Path:
        said_before.append(capsys.readouterr().out)
        raise OSError("no space left")

    monkeypatch.setattr(report, "write_report", refused)

    def end() -> None:
        options = {"rank": 0, "total_steps": 9, "start_step": 9, "epoch_samples": 9}
        with open_log(run, run.recipe(), **options) as log:
            log.end("finished")
            say_results(run, SUMMARY, log)

    with pytest.raises(OSError, match="no space"):
        end()
    assert "98.76%" in said_before[0]
    assert str(run.summary) in said_before[0].replace("\n", "")
    # The run ended well, whatever became of its report.
    assert [(e["kind"], e["state"]) for e in read_jsonl(run.events)] == [("end", "finished")]
