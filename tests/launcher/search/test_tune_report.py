"""The page of a search: as wide as the window at most, in light and dark."""

import re
from pathlib import Path

import pytest

from bigbatch.launcher.search import study
from bigbatch.launcher.search.tune import Search
from bigbatch.launcher.search.tune_report import summarise, write_report
from tests.launcher.search.test_study import NUMBERS, open_


@pytest.fixture
def page(tmp_path: Path) -> str:
    found = open_(tmp_path, NUMBERS, "random")
    for value in (0.2, 0.1):
        found.tell(study.ask(found, NUMBERS), value)
    search = Search("digits", (), NUMBERS, tmp_path, 2, 1, 1, None)
    return write_report(search, found, summarise(search, found)).read_text()


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
