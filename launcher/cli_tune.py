"""Commands that search: for a learning rate, a micro-batch, hyperparameters."""

import sys
from pathlib import Path

import click

from bigbatch.launcher import options


@click.command("find-lr", short_help="Find a learning rate by a short sweep.")
@options.recipe
@click.option("--nproc", type=click.IntRange(1), help="Processes; default: one per GPU.")
@click.option("--steps", type=int, default=100, show_default=True, help="Steps of the sweep.")
@click.option("--from", "low", type=float, help="First rate; default: the recipe's / 1000.")
@click.option("--to", "high", type=float, help="Last rate; default: the recipe's x 100.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture to write: .png, .svg, .pdf")
@options.as_json
def find_lr(
    recipe: str,
    overrides: tuple[str, ...],
    nproc: int | None,
    steps: int,
    low: float | None,
    high: float | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Raise the rate of RECIPE exponentially for a few steps and read the loss (Smith 2017).

    The recipe stays as it is: the change to use is printed. The rates are values of
    optimizer.lr, before optimizer.scale and the schedule.
    """
    import os
    import tempfile

    from bigbatch.configs.load import load_recipe
    from bigbatch.launcher import find_lr as work
    from bigbatch.launcher import start
    from bigbatch.launcher.child import RunFailed
    from bigbatch.trainers.lr_range import draw

    loaded = load_recipe(recipe, overrides)
    options.check_picture(plot)
    nproc = start.ranks_here(loaded, None, nproc, 1, os.environ)
    assert nproc is not None
    start.check_start(loaded)
    with tempfile.TemporaryDirectory(prefix="bigbatch-find-lr-") as folder:
        try:
            with options.steps_bar("sweep", steps) as progress:
                found = work.find_lr(
                    loaded,
                    Path(folder),
                    low=loaded.optimizer.lr / 1000 if low is None else low,
                    high=loaded.optimizer.lr * 100 if high is None else high,
                    steps=steps,
                    nproc=nproc,
                    progress=progress,
                )
        except RunFailed as error:
            click.echo(f"bigbatch: {error}", err=True)
            sys.exit(1)
    if plot is not None:
        options.write_picture(plot, lambda: draw(found, loaded.name, plot))
    changes = work.overrides(loaded, found.steepest)
    if as_json:
        options.print_json(
            {
                "recipe": loaded.name,
                "steepest": found.steepest,
                "tenth_of_minimum": found.tenth,
                "overrides": changes,
                "diverged": found.diverged,
                "lr": found.lr.tolist(),
                "loss": found.loss.tolist(),
                "plot": None if plot is None else str(plot),
            }
        )
        return
    end = "diverged at" if found.diverged else "still finite at"
    click.echo(f"steepest descent   {found.steepest:.3g}")
    click.echo(f"minimum / 10       {found.tenth:.3g}")
    click.echo(f"the loss           {end} {found.lr[-1]:.3g}")
    if plot is not None:
        click.echo(plot)
    click.echo(f"use it by          {' '.join(changes)}")
