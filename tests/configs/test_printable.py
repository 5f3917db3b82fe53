"""Text from data on a terminal: it stays text, wherever it is shown."""

import io
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.table import Table
from rich.text import Text

from bigbatch.configs.errors import UserError
from bigbatch.configs.printable import printable
from bigbatch.configs.redact import message
from bigbatch.configs.terminal import Terminal
from bigbatch.launcher.cli import options
from bigbatch.launcher.cli.render import inspect_tables
from bigbatch.launcher.runs import logs

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "[/red]",  # closes what was never opened: a traceback of rich's
    "[red]x[/red]",
    "[link=file:///etc/passwd]x[/link]",
    ":skull:",
    "\x1b[2J\x1b]0;title\x07\x1b[31mred",
    "\x9b31m",
    "a\rb\x00\x7f\x08",
    "\u202egnp.exe",
    "\udcff",
)


def shown(renderable: object, **options: object) -> str:
    file = io.StringIO()
    console = Terminal(file=file, force_terminal=True, color_system="truecolor", width=300)
    console.print(renderable, **options)
    file.getvalue().encode()  # what cannot be encoded ends the command
    return file.getvalue()


def check_plain(text: str) -> None:
    """Nothing is left that is not text, but for rich's own colours and styles."""
    own = re.compile(r"\x1b\[[0-9;]*m")
    assert printable(own.sub("", text)) == own.sub("", text)


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_and_escapes_stay_text_on_every_way_to_the_terminal(text: str) -> None:
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    table.add_row(Text(text, "bold"))
    for found in (shown(text), shown(Text(text, "red")), shown(table)):
        check_plain(found)
    assert printable(text) in shown(text, highlight=False)
    check_plain(message(UserError(f"class {text}")))
    check_plain(logs.paint(logs.Line("2026-01-01T00:00:00.000000Z", 0, text)))
    command = click.Command("say", callback=lambda: options.say(text))
    check_plain(CliRunner().invoke(command).output)


def test_text_is_as_it_was() -> None:
    for text in ("ordinary", "größe 猫 🐈", "two\nlines\tand a tab", "שלום"):
        assert printable(text) == text
    assert printable("\x1b\r\x7f\x85") == "␛␍␡�"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_class_of_any_name_can_be_inspected(name: str) -> None:
    """A name with [/red] ended `inspect` in a traceback."""
    split = {
        **dict.fromkeys(("samples", "shards", "bytes", "looked_at"), 1),
        "image_bytes": {},
        "short_side": {},
        "resolutions": [],
        "formats": {name: 1},
        "labels": {name: 1},
        "empty_classes": 0,
        "passed_over": {name: 1},
    }
    found = {"root": name, "splits": {name: split}, "duplicates": {name: 1}, "left_out": []}
    for table in inspect_tables(found):
        check_plain(shown(table))


def test_there_is_no_other_door() -> None:
    """No console of rich's own, no markup, and no bare echo in the commands."""
    found = []
    for room in ("configs", "data", "trainers", "launcher"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            found += [path.name for _ in re.finditer(r"(?<!\w)Console\(|rich\.markup", text)]
            if path.parent.name == "cli" and path.name not in ("options.py", "runs.py"):
                found += [path.name for _ in re.finditer(r"click\.echo\(", text)]
    assert not found
