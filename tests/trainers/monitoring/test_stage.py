"""What is said between the start of a run and its first step."""

import io
from unittest.mock import patch

import pytest

from bigbatch.trainers.monitoring.stage import stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_pipe_each_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    stage("opening the data")
    stage("building the model")
    said = "bigbatch: opening the data ...\nbigbatch: building the model ...\n"
    assert capsys.readouterr().err == said


def test_on_a_terminal_the_next_one_is_drawn_over_it() -> None:
    with patch("sys.stderr", Terminal()) as terminal:
        stage("opening the data")
        stage("building the model")
    lines = terminal.getvalue().split("\r")
    assert lines == [
        "\x1b[2Kbigbatch: opening the data ...",
        "\x1b[2Kbigbatch: building the model ...",
        "",
    ]


def test_other_ranks_say_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    stage("opening the data")
    assert capsys.readouterr().err == ""
