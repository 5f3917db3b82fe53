"""New runs and their names."""

from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunExists, create_run, event_record
from bigbatch.launcher.runs.registry import describe, new_run, status
from bigbatch.launcher.start import run_path
from bigbatch.trainers.recovery.failures import report

DIGITS = load_recipe("digits")


def test_starts_without_a_name_at_the_same_moment_all_get_one(tmp_path: Path) -> None:
    free = run_path(DIGITS, None, None, None, tmp_path)  # what each of them has found
    made = [new_run(free, DIGITS, made_up=True).path.name for _ in range(3)]
    assert made == ["digits", "digits-2", "digits-3"]


def test_a_run_that_failed_before_its_first_step_gives_its_name_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(tmp_path / "run", load_recipe("digits", ["model.name=no_model"]))
    with pytest.raises(RunExists):  # it may be starting
        new_run(run.path, DIGITS, made_up=False)
    assert report(UserError("no such model"), None, run.path) == 2
    assert describe(run).state == "failed"
    assert [alert["error"] for alert in status(run)["alerts"]] == ["no such model"]
    assert new_run(run.path, DIGITS, made_up=False).recipe() == DIGITS
    assert "takes its place" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["start", "submitted", "checkpoint"])
def test_a_run_that_has_begun_keeps_its_name(tmp_path: Path, kind: str) -> None:
    run = create_run(tmp_path / "run", DIGITS)
    if kind == "checkpoint":
        run.checkpoints.mkdir()
    else:
        run.events.write_text(to_json(event_record(kind, 0)) + "\n")
    report(UserError("no such model"), None, run.path)
    with pytest.raises(RunExists):
        new_run(run.path, DIGITS, made_up=False)
