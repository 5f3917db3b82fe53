"""The page of a search: as wide as the window at most, in light and dark."""

import re
from pathlib import Path

import pytest

from bigbatch.configs.rundir import RunDir
from bigbatch.launcher.search import study, tune_report
from bigbatch.launcher.search.tune import Search
from bigbatch.launcher.search.tune_report import summarise, write_report
from tests.launcher.search.test_study import NUMBERS, open_


def written(folder: Path) -> str:
    """The page of a study of two trials."""
    found = open_(folder, NUMBERS, "random")
    for value in (0.2, 0.1):
        found.tell(study.ask(found, NUMBERS), value)
    search = Search("digits", (), NUMBERS, folder, 2, 1, 1, None)
    return write_report(search, found, summarise(search, found)).read_text()


@pytest.fixture
def page(tmp_path: Path) -> str:
    return written(tmp_path)


def test_it_fits_windows_of_any_width_and_dark_mode(page: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert '<meta name="color-scheme" content="light dark">' in page
    assert "@media (prefers-color-scheme: dark)" in page
    # What cannot be narrow scrolls by itself: the table and commands. Pictures shrink.
    assert re.search(r"pre,\.scroll\{overflow-x:auto", page)
    assert '<div class="scroll"><table>' in page
    assert page.count("<table") == page.count('<div class="scroll">') == 1
    assert re.search(r"img\{[^}]*max-width:100%", page)
    assert re.search(r"main\{max-width:70rem", page)
    assert "<h1>digits: 2 trials</h1>" in page


def test_it_names_every_parameter(page: str) -> None:
    assert all(key in page for key in NUMBERS.parameters)


def test_a_trial_whose_report_cannot_be_drawn_ends_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its records are damaged, say: the search's page, table and best changes are there."""
    for number in range(2):
        RunDir(tmp_path / f"trials/{number:04d}").metrics.parent.mkdir(parents=True)
        RunDir(tmp_path / f"trials/{number:04d}").metrics.touch()

    def broken(run: RunDir) -> Path:
        raise ValueError("no such record")

    monkeypatch.setattr(tune_report, "write_run_report", broken)
    page = written(tmp_path)
    assert re.search(r"<p>Best: trial [01]</p><pre>bigbatch train digits", page)
    said = capsys.readouterr().err
    assert re.search(r"no report of 000[01]: no such record; `bigbatch report \S+` writes it", said)
