"""Arguments and options that several commands share, and how results are printed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def recipe(function: F) -> F:
    """RECIPE [key=value ...]: arguments `recipe` and `overrides`."""
    function = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function)
    return click.argument("recipe")(function)


def runs_folder(function: F) -> F:
    return click.option(
        "--runs",
        "runs_folder",
        type=click.Path(path_type=Path),
        default=Path("runs"),
        show_default=True,
        help="Folder of the run directories.",
    )(function)


def new_run(function: F) -> F:
    """--run NAME (or --run-name) or --run-dir PATH: where a new run goes."""
    function = click.option(
        "--run-dir", type=click.Path(path_type=Path), help="Directory of the run, given whole."
    )(function)
    # torchrun takes --run, even after its script, for an abbreviation of its --run-path.
    names = ("--run", "--run-name", "run")
    return click.option(*names, help="Name of the run; default: the recipe's, made new.")(function)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, default=str))
