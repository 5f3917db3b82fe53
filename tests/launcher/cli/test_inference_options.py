"""What evaluate, predict and ensemble hand on to the processes that they start."""

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.launcher import ranks
from bigbatch.launcher.cli import inference
from bigbatch.trainers.inference.__main__ import _parser
from bigbatch.trainers.inference.ensemble import METHODS
from bigbatch.trainers.inference.looks import TTA
from bigbatch.trainers.inference.soup import SOUPS


def choices(command: click.Command, name: str) -> list[str]:
    (option,) = (p for p in command.params if p.name == name)
    assert isinstance(option.type, click.Choice)
    return list(option.type.choices)


def test_choices_are_those_of_what_is_started() -> None:
    assert choices(inference.evaluate, "tta") == list(TTA)
    assert choices(inference.ensemble, "combine") == list(METHODS)
    assert choices(inference.ensemble, "soup") == list(SOUPS)


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("evaluate", ["--split", "val"], {"mc_dropout": 0, "tta": "none"}),
        ("evaluate", ["--mc-dropout", "5", "--tta", "five"], {"mc_dropout": 5, "tta": "five"}),
        ("predict", ["photos", "--out", "p.csv", "--mc-dropout", "3", "--features"],
         {"mc_dropout": 3, "features": True, "source": "photos"}),
        ("ensemble", ["--out", "e", "--soup", "uniform", "--margin", "0.1"],
         {"soup": "uniform", "margin": 0.1, "combine": "mean", "mc_dropout": 0}),
        ("ensemble", ["--out", "e"], {"soup": None, "coverage": None}),
    ],
)  # fmt: skip
def test_options_arrive(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: list[str],
    expected: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    create_run(tmp_path / "runs" / "a", load_recipe("digits"))
    started: list[list[str]] = []
    monkeypatch.setattr(ranks, "run_ranks", lambda module, given, *others: started.append(given))
    done = CliRunner().invoke(getattr(inference, command), ["a", *arguments])
    assert done.exit_code == 0, done.output
    options = vars(_parser().parse_args(started[0]))
    assert {key: options[key] for key in expected} == expected


def test_no_passes_are_no_choice() -> None:
    done = CliRunner().invoke(inference.evaluate, ["a", "--mc-dropout", "0"])
    assert done.exit_code == 2
    assert "--mc-dropout" in done.output
