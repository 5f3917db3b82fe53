"""Commands about runs that exist: list, show, follow, stop, remove."""

from pathlib import Path

import click

from bigbatch.launcher.cli import options

_STATES = (
    *("new", "queued", "running", "stopped", "failed", "finished", "killed"),
    "unreadable",
)


@click.command(short_help="List runs.")
@click.argument("pattern", default="*")
@click.option(
    "--state", "states", type=click.Choice(_STATES), multiple=True, help="May be repeated."
)
@click.option("--watch", is_flag=True, help="Look again every two seconds, until Ctrl-C.")
@options.runs_folder
@options.as_json
def runs(
    pattern: str, states: tuple[str, ...], watch: bool, runs_folder: Path, as_json: bool
) -> None:
    """List the runs whose name matches PATTERN: state, steps, best validation accuracy, job.

    \b
    bigbatch runs 'imagenet-*' --state running --state queued
    """
    from dataclasses import asdict
    from fnmatch import fnmatchcase

    from bigbatch.launcher.runs.registry import RunInfo, list_runs

    def look() -> list[RunInfo]:
        found = list_runs(runs_folder)
        return [r for r in found if fnmatchcase(r.name, pattern) and r.state in (states or _STATES)]

    if watch:
        from bigbatch.launcher.cli.render import follow, runs_table

        follow(lambda: runs_table(look()))
        return
    found = look()
    if as_json:
        options.print_json([asdict(info) for info in found])
    elif not found:
        options.say(f"no runs in {runs_folder}" + (" match" if pattern != "*" or states else ""))
    else:
        from bigbatch.launcher.cli.render import runs_table, show

        show(runs_table(found))


@click.command(short_help="Show one run.")
@click.argument("run")
@options.runs_folder
@options.as_json
def status(run: str, runs_folder: Path, as_json: bool) -> None:
    """Show where RUN, a name or a directory, stands."""
    from bigbatch.launcher.runs import registry

    values = registry.status(registry.find_run(run, runs_folder))
    if as_json:
        options.print_json(values)
    else:
        from bigbatch.launcher.cli.render import show, status_table

        show(status_table(values))


@click.command(short_help="Show what the ranks of a run said.")
@click.argument("run")
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends, or Ctrl-C.")
@click.option("--lines", "-n", type=click.IntRange(0), help="Only the last N lines so far.")
@click.option("--rank", "ranks", type=click.IntRange(0), multiple=True, help="May be repeated.")
@options.runs_folder
@options.as_json
def logs(
    run: str,
    follow: bool,
    lines: int | None,
    ranks: tuple[int, ...],
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Show the output of all ranks of RUN, merged by time, each rank in its own colour."""
    from bigbatch.configs.files import to_json
    from bigbatch.launcher.runs import logs as reader
    from bigbatch.launcher.runs.registry import find_run

    found = find_run(run, runs_folder)
    if follow:
        source = reader.follow(found, ranks, past=lines)
    else:
        source = reader.read(found, ranks)
        source = source if lines is None else reader.last(source, lines)
    for line in source:
        if as_json:
            options.say(to_json(line._asdict()))
        else:
            click.echo(reader.paint(line))


@click.command(short_help="Let a run save, and end it.")
@click.argument("run")
@options.runs_folder
@options.as_json
def cancel(run: str, runs_folder: Path, as_json: bool) -> None:
    """Let RUN finish its step, save, and end; on SLURM its job is not requeued.

    `bigbatch resume RUN` goes on with it.
    """
    from bigbatch.launcher.runs.registry import cancel as stop
    from bigbatch.launcher.runs.registry import find_run

    found = find_run(run, runs_folder)
    done = stop(found)
    if as_json:
        options.print_json({"run": str(found.path), "done": done})
    else:
        options.say(done)


@click.command(short_help="Send offline wandb records of runs.")
@click.argument("names", metavar="RUN...", nargs=-1, required=True)
@options.runs_folder
@options.as_json
def sync(names: tuple[str, ...], runs_folder: Path, as_json: bool) -> None:
    """Send to wandb what RUNs recorded offline: all attempts, as one wandb run each."""
    import subprocess
    import sys

    from bigbatch.configs.errors import UserError
    from bigbatch.launcher.launchers import python
    from bigbatch.launcher.runs.registry import find_run, look_up

    found = [find_run(name, runs_folder) for name in names]
    for run in found:
        if look_up(run).state == "running":
            raise UserError(f"{run.name} is running, and writes those files; sync it when it ends")
    sent = {}
    for run in found:
        command = [*python("bigbatch.trainers.monitoring.wandb_sync"), str(run.path)]
        # What it says is no part of the object.
        talk = 2 if as_json else None
        sent[str(run.path)] = subprocess.run(command, stdout=talk, check=False).returncode == 0
    if as_json:
        options.print_json({"runs": [{"run": run, "sent": done} for run, done in sent.items()]})
    sys.exit(0 if all(sent.values()) else 1)


@click.command("rm", short_help="Remove runs.")
@click.argument("names", metavar="RUN...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@options.runs_folder
@options.as_json
def remove(names: tuple[str, ...], yes: bool, runs_folder: Path, as_json: bool) -> None:
    """Remove run directories with all they hold. Refuses runs that run or wait in a queue."""
    from bigbatch.launcher.runs import registry

    found = [registry.find_run(name, runs_folder, whole=False) for name in names]
    removed = []
    try:
        for run in found:
            step = registry.describe(run).step
            link = f", a link to {run.path.resolve()}" if run.path.is_symlink() else ""
            if not yes:
                what = f"{run.path}{link}, at step {step}, with its checkpoints"
                click.confirm(f"remove {what}?", abort=True, err=as_json)
            registry.remove(run)
            removed.append(str(run.path))
            if not as_json:
                options.say(f"removed {run.path}{link}")
    finally:
        if as_json:
            options.print_json({"removed": removed})
