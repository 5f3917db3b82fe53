"""Commands that search: for a learning rate, a micro-batch, hyperparameters."""

import sys
from pathlib import Path
from typing import Any

import click

from bigbatch.launcher.cli import options


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
    from bigbatch.data.measured import with_measured
    from bigbatch.launcher import start
    from bigbatch.launcher.child import RunFailed
    from bigbatch.launcher.search import find_lr as work
    from bigbatch.trainers.advice.lr_range import draw

    loaded = load_recipe(recipe, overrides)
    options.check_picture(plot)
    low = loaded.optimizer.lr / 1000 if low is None else low
    high = loaded.optimizer.lr * 100 if high is None else high
    work.sweep_recipe(loaded, low, high, steps)  # refuses what cannot be swept
    # A sweep has steps of the first batch alone, which is what lr is for.
    swept = loaded.model_copy(update={"global_batch": loaded.first_batch})
    nproc = start.ranks_here(swept, None, nproc, 1, os.environ)
    assert nproc is not None
    start.check_start(loaded)
    loaded = with_measured(loaded)
    with tempfile.TemporaryDirectory(prefix="bigbatch-find-lr-") as folder:
        try:
            with options.steps_bar("sweep", steps) as progress:
                found = work.find_lr(
                    loaded,
                    Path(folder),
                    low=low,
                    high=high,
                    steps=steps,
                    nproc=nproc,
                    progress=progress,
                )
        except RunFailed as error:
            options.say(f"bigbatch: {error}", err=True)
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
    options.say(f"steepest descent   {found.steepest:.3g}")
    options.say(f"minimum / 10       {found.tenth:.3g}")
    options.say(f"the loss           {end} {found.lr[-1]:.3g}")
    if plot is not None:
        options.say(plot)
    options.say(f"use it by          {' '.join(changes)}")


@click.command("find-micro-batch", short_help="Find the largest micro-batch that fits.")
@options.recipe
@click.option("--nproc", type=click.IntRange(1), help="Processes here; default: one per GPU.")
@click.option("--memory", type=float, help="GB of host memory; default: 90 % of what is free.")
@options.as_json
def find_micro_batch(
    recipe: str,
    overrides: tuple[str, ...],
    nproc: int | None,
    memory: float | None,
    as_json: bool,
) -> None:
    """Find the largest micro_batch of RECIPE that fits in memory on every rank.

    Each size is tried by a few real steps; sizes are the divisors of global_batch. It is no
    option of training: BatchNorm's statistics are those of a micro-batch, so another size
    computes something else. The change to use is printed.
    """
    import math
    import os
    import tempfile
    from dataclasses import asdict

    from bigbatch.configs.errors import UserError
    from bigbatch.configs.load import load_recipe
    from bigbatch.data.measured import with_measured
    from bigbatch.launcher import start
    from bigbatch.launcher.child import RunFailed
    from bigbatch.launcher.env import default_nproc
    from bigbatch.launcher.search import find_micro_batch as work

    loaded = load_recipe(recipe, overrides)
    if memory is not None and not 0 < memory < math.inf:
        raise UserError(f"--memory {memory:g}: give the GB that all processes together may take")
    world = nproc or min(default_nproc(os.environ), loaded.largest_batch)
    sizes = work.sizes(loaded, world)
    start.check_start(loaded)
    loaded = with_measured(loaded)
    limit = work.free_memory() if memory is None else int(memory * 1e9)
    if not as_json:
        options.say(
            f"{options.plural(len(sizes), 'size')} of micro_batch, "
            f"{options.span(min(sizes), max(sizes))}, on {options.plural(world, 'rank')}, within "
            f"{limit / 1e9:.2f} GB of host memory"
        )

    def say(probe: work.Probe) -> None:
        rate = "" if probe.images_per_s is None else f", {probe.images_per_s:,.0f} img/s"
        verdict = "fits" if probe.fits else "does not fit"
        if not as_json:
            host = f"{probe.peak_bytes / 1e9:.2f} GB of host memory"
            options.say(f"micro_batch {probe.micro_batch:>6,}  {verdict}: {host}{rate}")

    with tempfile.TemporaryDirectory(prefix="bigbatch-find-micro-batch-") as folder:
        try:
            tried = work.find(loaded, world, Path(folder), limit, say)
        except RunFailed as error:
            options.say(f"bigbatch: {error}", err=True)
            sys.exit(1)
    best = max(p.micro_batch for p in tried if p.fits)
    if as_json:
        options.print_json(
            {
                "micro_batch": best,
                "overrides": [f"micro_batch={best}"],
                "ranks": world,
                "limit_bytes": limit,
                "probes": [asdict(p) for p in tried],
            }
        )
        return
    options.say(f"use it by  micro_batch={best}")


@click.command(short_help="Search hyperparameters.")
@click.argument("recipe")
@click.argument("space", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--trials", type=click.IntRange(1), help="Trials in all; default: 20, or the grid.")
@click.option(
    "--sampler",
    type=click.Choice(["grid", "random", "tpe", "gp", "cmaes", "nsga2"]),
    help="Default: tpe; nsga2 for several objectives.",
)
@click.option(
    "--pruner",
    type=click.Choice(["none", "median", "halving", "hyperband"]),
    default="none",
    show_default=True,
    help="Stops trials by their validation results.",
)
@click.option(
    "--startup",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Trials by chance first.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--parallel", type=click.IntRange(1), default=1, show_default=True, help="At a time.")
@click.option("--nproc", type=click.IntRange(1), help="Processes of a trial here.")
@click.option("--study", type=click.Path(path_type=Path), help="Folder; default: studies/RECIPE.")
@click.option("--slurm", metavar="OPTIONS", help="Trials as jobs, by `bigbatch submit OPTIONS`.")
@options.as_json
def tune(
    recipe: str,
    space: Path,
    overrides: tuple[str, ...],
    trials: int | None,
    sampler: Any,
    pruner: Any,
    startup: int,
    seed: int,
    parallel: int,
    nproc: int | None,
    study: Path | None,
    slurm: str | None,
    as_json: bool,
) -> None:
    """Search the recipe keys that SPACE names, by runs of RECIPE with KEY=VALUE changes.

    \b
    bigbatch tune digits space.yaml --trials 30 --sampler tpe --pruner median
    bigbatch tune digits space.yaml --parallel 8 --slurm "--gpus-per-node 4 --time 2:00:00"

    The same command goes on with a study that was stopped or killed. Prints the best changes.
    """
    import os
    import shlex

    from bigbatch.configs.errors import UserError
    from bigbatch.configs.load import load_recipe
    from bigbatch.configs.rundir import RunDir
    from bigbatch.configs.space import load_space
    from bigbatch.launcher import start
    from bigbatch.launcher.cli.render import show
    from bigbatch.launcher.search import study as studies
    from bigbatch.launcher.search import tune as work
    from bigbatch.launcher.search.trial import submit
    from bigbatch.launcher.search.tune_report import summarise, table, write_report
    from bigbatch.trainers.planning.inputs import open_inputs
    from bigbatch.trainers.recovery.signals import SAVED

    base = load_recipe(recipe, overrides)
    if base.phases is not None:
        raise UserError(
            f"phases: {base.phases.name}: a trial is one run, and would be the trunk alone; tune "
            "that with phases=null"
        )
    searched = load_space(space, recipe, overrides)
    sampler = sampler or ("nsga2" if len(searched.objectives) > 1 else "tpe")
    studies.check(searched, sampler, pruner)
    ranks = start.ranks_here(base, None, nproc, 1, os.environ)
    assert ranks is not None
    plan = open_inputs(base).plan
    if trials is None:
        trials = studies.grid_size(searched) if sampler == "grid" else 20
    folder = (study or Path("studies") / base.name).absolute()
    try:
        asked = None if slurm is None else tuple(shlex.split(slurm))
    except ValueError as error:
        raise UserError(f"--slurm {slurm!r}: {error}; close each quotation") from None
    if asked is not None:
        for option in ("--array", "--vary", "--run", "--run-name", "--run-dir", "--dry-run"):
            if any(word.split("=")[0] == option for word in asked):
                raise UserError(
                    f"--slurm: {option} cannot be given, each trial is one run; drop it"
                )
        trial = RunDir(folder / "trials/0000")
        submit(recipe, overrides, trial, asked, "--dry-run", "--no-check")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the study's folder {folder}: {error.strerror}; name another by --study"
        ) from None
    click.get_current_context().with_resource(studies.acquire_study_lock(folder))
    found = studies.open_study(
        folder,
        searched,
        base,
        sampler=sampler,
        pruner=pruner,
        seed=seed,
        startup=startup,
        trials=trials,
        evaluations=sum(plan.evaluates(step) for step in range(1, plan.total + 1)),
    )
    search = work.Search(
        recipe,
        overrides,
        searched,
        folder,
        trials=trials,
        parallel=parallel,
        nproc=ranks,
        slurm=asked,
        reports=base.log.report and "report" in base.log.model_fields_set,
    )
    interrupted = False
    with options.steps_bar("trials", trials) as progress:

        def say(text: str, done: int) -> None:
            options.say(text, err=True)
            progress(done)

        try:
            work.run_search(search, found, say)
        except work.Interrupted:
            interrupted = True
    summary = summarise(search, found)
    summary["report"] = str(write_report(search, found, summary))
    if as_json:
        options.print_json(summary)
    else:
        show(table(summary))
        for best in summary["best"]:
            options.say(f"trial {best['number']}: {shlex.join(best['overrides'])}")
        options.say(f"report  {summary['report']}")
    if interrupted:
        options.say("bigbatch: stopped; the same command goes on with this study", err=True)
        sys.exit(SAVED)
