"""`bigbatch export`: what it hands on to the process that knows torch."""

import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.launcher.cli.main import cli
from bigbatch.trainers.export.__main__ import main


class Became(Exception):
    """The process was replaced by this command."""


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def execv(path: str, command: list[str]) -> None:
        assert path == command[0] == sys.executable
        seen.extend(command[1:])
        raise Became

    seen: list[str] = []
    monkeypatch.setattr(os, "execv", execv)
    return seen


def invoke(*arguments: str) -> None:
    CliRunner().invoke(cli, ["export", *arguments], catch_exceptions=False)


def test_all_options_reach_the_process(became: list[str], tmp_path: Path) -> None:
    run = create_run(tmp_path / "mine", load_recipe("digits", ()))
    with pytest.raises(Became):
        invoke("mine", "--runs", str(tmp_path), "--out", "a.onnx", "--members", "all", "--check",
               "--data", "there", "--images", "7", "--json")  # fmt: skip
    assert became == [
        "-P", "-m", "bigbatch.trainers.export", str(run.path), "--out", "a.onnx",
        "--members", "all", "--images", "7", "--check", "--data", "there", "--json",
    ]  # fmt: skip


def test_a_folder_of_an_ensemble_is_taken_as_it_is(became: list[str], tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text("{}")
    with pytest.raises(Became):
        invoke(str(tmp_path), "--out", "a.pt2")
    assert became[3:6] == [str(tmp_path), "--out", "a.pt2"]


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run 'nothing'"):
        invoke("nothing", "--runs", str(tmp_path), "--out", "a.onnx")


def test_a_wrong_ending_is_said_before_anything_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothing"), "--out", "a.h5"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "bigbatch: --out a.h5: the name must end in .onnx, .pt2 or .safetensors, which says what "
        "to write\n"
    )
