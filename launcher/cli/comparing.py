"""The commands that look at what runs came to, bit by bit: diff and audit."""

import os
import secrets
import sys
from pathlib import Path
from typing import NoReturn

import click

from bigbatch.launcher.cli import options


@click.command(short_help="The first step at which two runs differ, and in what.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--ledgers", is_flag=True, help="Compare what is on record; make no step again.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw both runs' curves into a file.")
@options.as_json
@options.runs_folder
def diff(
    a: str, b: str, ledgers: bool, plot: Path | None, as_json: bool, runs_folder: Path
) -> None:
    """Compare recipes, data, ledgers and evaluations of the runs A and B.

    Where a step differs it is made again on both, in one process, from the last checkpoints at
    which they are the same: so that the step is named where ledgers have one line for several, and
    in it the first sample, pixel, layer, gradient or update that differs. Both are only read.

    Splits that both were evaluated on are compared sample by sample, by key: differences of
    accuracy and nll with intervals of a paired bootstrap, and McNemar's test.

    Equal means equal bits. Exit status, of bits alone, whatever evaluations say: 0 the same as far
    as both go, 1 they differ, 2 they cannot be compared: no ledger, no step in common, or a
    difference that their environments (device, versions, threads), or ranks without reduction:
    exact, may have made.
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.trainers.evaluation import pairs
    from bigbatch.trainers.ledger.compare import DIFFERS, NOT_AGAIN, compare, in_words
    from bigbatch.trainers.replay.past import whence

    options.check_picture(plot)
    runs = find_run(a, runs_folder), find_run(b, runs_folder)
    found = compare(*runs)
    if plot is not None:
        from bigbatch.trainers.ledger.plot import draw_curves

        at = found.parting.step if found.parting else None
        options.write_picture(plot, lambda: draw_curves(runs, at, plot))
    why_not = None
    if found.parting is not None and found.status == DIFFERS and not ledgers:
        try:
            whence(runs, found.parting.step, found.parting.after)
        except UserError as error:
            why_not = str(error)
        else:
            _compute(["diff", *(str(run.path) for run in runs), *["--json"] * as_json])
    evaluations = pairs.pair_evaluations(*runs)
    if as_json:
        paths = {"A": str(runs[0].path), "B": str(runs[1].path)}
        more = {"below": None, "why_not_below": why_not, "evaluations": evaluations}
        options.print_json(paths | found.as_json() | more)
        sys.exit(found.status)
    options.say("\n".join(in_words(found, runs)))
    if why_not is not None:
        options.say(f"  {NOT_AGAIN}: {why_not}")
    options.say("\n".join(["", *pairs.in_words(evaluations), "", found.verdict]))
    sys.exit(found.status)


@click.command(short_help="Whether a run is what its ledger says, and comes out again.")
@click.argument("run")
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the intervals between checkpoints to compute again, at least one.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    help="Which ones are drawn; default: nobody can know before.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the certificate (JSON).")
@options.as_json
@options.runs_folder
def audit(
    run: str,
    fraction: float | None,
    seed: int | None,
    out: Path | None,
    as_json: bool,
    runs_folder: Path,
) -> None:
    """Check RUN's metrics.jsonl and checkpoints against its ledger, and the ledger's own chain.

    \b
    bigbatch audit digits                                     the files alone: seconds
    bigbatch audit digits --fraction 0.1 --out audit.json     and a tenth of the run once more

    With --fraction, intervals between checkpoints are drawn at random and computed again, on one
    process, whatever made them: losses, norms, rates, lines of the ledger, and weights, optimizer
    state and statistics of the checkpoint at the end have to come out bit for bit. RUN is only
    read, unless --out is in it: `bigbatch export` puts RUN/audit.json into the model card.

    Exit status: 0 all is the same, 1 something was changed, 2 there is no ledger, or no step in
    it, or what was computed again differs and another environment may be why. It shows that what
    a run claims is consistent, not that its training was honest.
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.configs.files import check_writable
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.trainers.ledger.audit import audit as check
    from bigbatch.trainers.ledger.audit import in_words
    from bigbatch.trainers.ledger.lines import read_ledger
    from bigbatch.trainers.replay.certificate import STATUS, certificate, verdict, write

    found_run = find_run(run, runs_folder)
    if fraction is None and seed is not None:
        raise UserError(f"--seed {seed} says which steps are computed again; give --fraction too")
    if out is not None:
        if os.path.lexists(out):
            raise UserError(f"{out} exists already; choose another --out, or remove it")
        check_writable(out)
    if fraction is not None:
        seed = secrets.randbelow(1 << 31) if seed is None else seed
        arguments = ["audit", str(found_run.path), "--fraction", repr(fraction)]
        arguments += ["--seed", str(seed), *([] if out is None else ["--out", str(out)])]
        _compute(arguments + ["--json"] * as_json)
    ledger = read_ledger(found_run.ledger)
    files = check(found_run, ledger)
    found = certificate(found_run, ledger, files, [], [], None, None)
    if out is not None:
        write(out, found)
    if as_json:
        options.print_json(found)
    else:
        options.say("\n".join([*in_words(files), verdict(found)]))
    sys.exit(STATUS[found["verdict"]])


def _compute(arguments: list[str]) -> NoReturn:
    """Become the process that replays."""
    from bigbatch.launcher.env import check_single
    from bigbatch.launcher.ranks import run_ranks
    from bigbatch.trainers.planning.environment import check_environment

    check_single(arguments[0], os.environ)
    check_environment(os.environ)
    run_ranks("bigbatch.trainers.replay", arguments, None, 1)
