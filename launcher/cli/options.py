"""Arguments and options that several commands share, and how results are printed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.printable import printable
from bigbatch.configs.words import plural as plural
from bigbatch.configs.words import span as span

F = TypeVar("F", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def recipe(function: F) -> F:
    """RECIPE [key=value ...]: arguments `recipe` and `overrides`."""
    function = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function)
    return click.argument("recipe")(function)


members = click.option(
    "--members",
    default="auto",
    show_default=True,
    help="auto: those that the run kept; all; or names such as cycle-01,soup.",
)


def runs_folder(function: F) -> F:
    return click.option(
        "--runs",
        "runs_folder",
        type=click.Path(path_type=Path),
        default=Path("runs"),
        show_default=True,
        help="Folder of the run directories.",
    )(function)


def check_at_once(several: bool, at_once: int | None) -> None:
    """Raise UserError where --at-once stands without the runs that it is for."""
    if not several and at_once is not None:
        raise UserError(
            f"--at-once {at_once} is how many of several --members, or workers of a recipe's "
            "phases, train side by side; say how many there are, or leave it out"
        )


def new_run(function: F) -> F:
    """--run NAME (or --run-name) or --run-dir PATH: where a new run goes."""
    function = click.option(
        "--run-dir", type=click.Path(path_type=Path), help="Directory of the run, given whole."
    )(function)
    # torchrun takes --run, even after its script, for an abbreviation of its --run-path.
    names = ("--run", "--run-name", "run")
    return click.option(*names, help="Name of the run; default: a new one.")(function)


def say(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print text of which a part may come from data."""
    click.echo(printable(str(text)), err=err, nl=nl)


def print_json(value: Any) -> None:
    click.echo(to_json(value, indent=1, default=str))


def check_picture(path: Path | None) -> None:
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {path}: the name must end in .png, .svg or .pdf")


def write_picture(path: Path, draw: Callable[[], None]) -> None:
    """Call `draw`, which writes `path`."""
    try:
        draw()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


@contextmanager
def steps_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields the function that moves it to a step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from bigbatch.configs.terminal import Terminal

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Terminal(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda step: bar.update(task, completed=step)
