"""`bigbatch compress` from outside: what it refuses before torch starts, and what it starts."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.launcher.cli.main import cli


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return create_run(tmp_path / "runs" / "a", load_recipe("digits", [])).path


def compress(run: Path, *options: str) -> list[str]:
    """The arguments of the process that the command becomes."""
    started: list[str] = []
    arguments = ["compress", str(run), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "execv", lambda path, command: started.extend(command))
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    return started


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "squeeze"], "--method 'squeeze' is none of prune, structured"),
        (["--method", "prune", "--share", "1.5"], "--share 1.5 must lie between 0 and 1"),
        (["--method", "int8", "--share", "0.5"], "--share 0.5 is for prune"),
        (["--method", "lowrank", "--importance", "taylor"], "taylor is for prune, structured"),
        (["--method", "codebook", "--finetune", "1 epochs"], "is for prune, structured, lowrank"),
        (["--method", "prune", "--calibration", "minmax"], "--calibration minmax is for int8"),
        (["--method", "prune", "--images", "8"], "--images 8 is for int8 and --importance taylor"),
        (["--method", "prune", "--finetune-lr", "0.1"], "give a length too"),
        (["--method", "prune", "--finetune", "1 epochs", "--finetune-lr", "-1"], "above 0"),
        (["--method", "prune", "--finetune", "2"], "'2' is not a duration"),
        (["--method", "prune", "--finetune", "0 epochs"], "is no time at all"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compress(run, *options, "--out", str(tmp_path / "small"))


def test_a_folder_that_is_there_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        compress(run, "--method", "prune", "--out", str(tmp_path))


def test_becomes_the_process_that_compresses(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    options = ["--method", "prune", "--share", "0.5", "--finetune", "2 epochs", "--json"]
    command = compress(run, *options, "--out", str(out))
    assert command[-9:] == [
        "bigbatch.trainers.compress", str(run), "--method=prune", f"--out={out}",
        "--members=auto", "--share=0.5", "--finetune=2 epochs", "--rounds=50", "--json",
    ]  # fmt: skip
