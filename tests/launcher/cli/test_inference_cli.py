"""What the commands after training make of their options before any rank starts."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.launcher.cli import inference
from bigbatch.launcher.cli.main import cli


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been started."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        inference, "_start", lambda *given, **options: calls.append((*given, options))
    )
    return calls


def run_of(folder: Path, name: str, *overrides: str) -> str:
    path = folder / name
    create_run(path, load_recipe("digits", ["log.wandb=off", *overrides]))
    return str(path)


def call(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_test_split_of_remote_data_is_not_passed_over(
    tmp_path: Path, started: list[Any]
) -> None:
    url = "s3://bucket/shards"
    run = run_of(tmp_path, "a", f"data.path={url}", "data.cache=/tmp/cache")
    call("evaluate", run)
    call("ensemble", run, "--out", str(tmp_path / "e"))
    assert started[0][2] == f"{url}/test"
    assert started[1][-1]["more"][-2:] == ["--report", f"{url}/test"]


def test_only_the_test_split_of_the_usual_name_may_be_missing(
    tmp_path: Path, started: list[Any]
) -> None:
    shards = tmp_path / "shards"
    call("evaluate", run_of(tmp_path, "a", f"data.path={shards}"))
    call("evaluate", run_of(tmp_path, "b", f"data.path={shards}", "data.test=holdout"))
    call("evaluate", run_of(tmp_path, "c", f"data.path={shards}", "data.test=null"))
    assert [Path(call[2]).name for call in started] == ["val", "holdout", "val"]


def test_runs_of_other_data_are_told_of(
    tmp_path: Path, started: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = (run_of(tmp_path, name, f"data.path=/{name}") for name in "ab")
    said = call("evaluate", one, two)
    assert f"{two} was trained on /b (val: val, test: test), {one} on /a (val" in said
    assert "all are judged on /a/val" in said
    assert "trained on" not in call("evaluate", one, two, "--data", "/a", "--split", "val")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--margin", "nan"], "--margin nan"),
        (["--coverage", "0"], r"--coverage 0\.0"),
        (["--coverage", "nan"], "--coverage nan"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_images_are_read(
    tmp_path: Path, started: list[Any], options: list[str], said: str
) -> None:
    run = run_of(tmp_path, "a")
    with pytest.raises(UserError, match=said):
        call("ensemble", run, "--out", str(tmp_path / "e"), *options)
    assert not started


@pytest.mark.parametrize("command", ["evaluate", "ensemble"])
def test_a_place_that_takes_nothing_is_refused_before_images_are_read(
    tmp_path: Path, command: str
) -> None:
    run = run_of(tmp_path, "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is no folder; choose another --out"):
        call(command, run, "--data", "d", "--split", "s", "--out", str(tmp_path / "file" / "e"))
