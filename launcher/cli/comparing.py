"""The commands that look at what runs came to, bit by bit: diff and audit."""

import shlex
import sys
from pathlib import Path

import click

from bigbatch.launcher.cli import options


@click.command(short_help="The first step at which two runs differ, and in what.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw both runs' losses into a file.")
@options.as_json
@options.runs_folder
def diff(a: str, b: str, plot: Path | None, as_json: bool, runs_folder: Path) -> None:
    """Compare recipes, data and ledgers of the runs A and B.

    Equal means equal bits. Exit status: 0 the same as far as both go, 1 they differ, 2 they
    cannot be compared: no ledger, no step in common, or a difference that their environments
    (device, versions, threads), or ranks without reduction: exact, may have made.
    """
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.trainers.ledger.compare import MEANINGS, compare

    options.check_picture(plot)
    runs = find_run(a, runs_folder), find_run(b, runs_folder)
    found = compare(*runs)
    if plot is not None:
        from bigbatch.trainers.ledger.plot import draw_losses

        at = found.parting.step if found.parting else None
        options.write_picture(plot, lambda: draw_losses(runs, at, plot))
    replay = None
    if found.parting is not None and runs[0].recipe().data.stream is None:
        replay = f"bigbatch replay {shlex.quote(str(runs[0].path))} --step {found.parting.step}"
    if as_json:
        paths = {"A": str(runs[0].path), "B": str(runs[1].path)}
        options.print_json(paths | found.as_json() | {"replay": replay})
        sys.exit(found.status)
    say = options.say
    say(f"A {runs[0].path}\nB {runs[1].path}\n")
    for title, lines in (
        ("recipe", found.recipe),
        ("data", found.data),
        ("versions", found.versions),
        ("environment", found.environment),
    ):
        say("\n".join(f"{title}: {line}" for line in lines or ["the same"]))
    for note in found.notes:
        say(f"note: {note}")
    compared = options.plural(found.compared, "step")
    where = f"{found.steps[0]} to {found.steps[1]}" if found.steps else "none"
    say(f"ledgers: steps in both: {where}; compared: {compared}")
    for name, more in found.beyond.items():
        if more:
            say(f"ledgers: {name} goes on for {options.plural(more, 'step')}")
    if (parting := found.parting) is not None:
        since = "" if parting.after is None else f"; step {parting.after} is the same in all"
        say(f"\nstep {parting.step} differs first in: {parting.first}{since}")
        say(f"  {MEANINGS[parting.first]}")
        for sample in parting.samples:
            say(f"  {sample}")
        if parting.digests[1:]:
            say(f"  and then in: {', '.join(parting.digests[1:])}")
        if replay is not None:
            say(f"  {replay} makes it again")
    say(f"\n{found.verdict}")
    sys.exit(found.status)


@click.command(short_help="Whether a run's records and checkpoints are what its ledger says.")
@click.argument("run")
@options.as_json
@options.runs_folder
def audit(run: str, as_json: bool, runs_folder: Path) -> None:
    """Check RUN's metrics.jsonl and checkpoints against its ledger, and the ledger's own chain.

    Exit status: 0 they agree, 1 something was changed, 2 there is no ledger, or no step in it. It
    shows that files agree with each other; nothing is computed again.
    """
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.trainers.ledger.audit import audit as look

    found = look(find_run(run, runs_folder))
    if as_json:
        options.print_json(found.as_json())
        sys.exit(0 if found.passed else 1)
    plural = options.plural
    steps = ", ".join(map(str, found.checkpoints)) or "none"
    options.say(
        f"ledger: {plural(found.steps, 'step')}, each of which follows from those before it"
    )
    options.say(
        f"metrics.jsonl: {plural(found.losses, 'loss')} bit for bit, "
        f"{plural(found.saves, 'save')} by SHA-256"
    )
    options.say(f"checkpoints: weights, optimizer and statistics of steps {steps}")
    for title, lines in (
        ("note", found.notes),
        ("not shown", found.not_shown),
        ("CHANGED", found.findings),
    ):
        for line in lines:
            options.say(f"{title}: {line}")
    options.say("passed" if found.passed else "FAILED: the run is not what its ledger says")
    sys.exit(0 if found.passed else 1)
