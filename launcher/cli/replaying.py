"""The command that makes a step of a run once more, to look into it."""

import os
from pathlib import Path

import click

from bigbatch.launcher.cli import options


@click.command(short_help="Make a step of a run again, and look into it.")
@click.argument("run")
@click.option("--step", type=click.IntRange(1), required=True, help="As metrics.jsonl counts them.")
@click.option("--micro", type=click.IntRange(0), help="Look into the samples of this micro-batch.")
@click.option("--sample", metavar="KEY", help="Look into the micro-batch of this sample.")
@click.option("--layers", is_flag=True, help="Also activations: dead, saturated, not finite.")
@click.option(
    "--from",
    "start",
    type=click.IntRange(0),
    help="Checkpoint to begin at, or 0; default: the newest before.",
)
@click.option(
    "--before-rollback", is_flag=True, help="The step as it was when the run went back from it."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="New folder: page, JSON, a picture of each micro-batch, tensors.",
)
@options.runs_folder
@options.as_json
def replay(
    run: str,
    step: int,
    micro: int | None,
    sample: str | None,
    layers: bool,
    start: int | None,
    before_rollback: bool,
    out: Path | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Make step N of RUN again, in one process, and say what it was made of.

    \b
    bigbatch replay digits --step 61                    same as recorded? which sample, which layer?
    bigbatch replay digits --step 61 --layers --out why-61

    From the newest checkpoint before it, into a scratch directory: RUN is only read. With
    `reduction: exact` loss and gradient norm come out as recorded, bit for bit, however many
    ranks the run had; the exit status is 1 where they do not.
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.configs.files import check_writable
    from bigbatch.launcher.env import check_single
    from bigbatch.launcher.ranks import run_ranks
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.trainers.planning.environment import check_environment
    from bigbatch.trainers.replay.past import find_past

    check_single("replay", os.environ)
    check_environment(os.environ)
    found = find_run(run, runs_folder)
    if out is not None:
        if os.path.lexists(out):
            raise UserError(f"{out} exists already; choose another --out, or remove it")
        if out.resolve().is_relative_to(found.path.resolve()):
            raise UserError(
                f"--out {out} is in the run, which a replay leaves alone; choose another"
            )
        check_writable(out)
    find_past(found, step, start=start, before_rollback=before_rollback)  # before torch loads
    arguments = ["step", str(found.path), "--step", str(step), *["--layers"] * layers]
    arguments += [] if micro is None else ["--micro", str(micro)]
    arguments += [] if sample is None else [f"--sample={sample}"]
    arguments += [] if start is None else ["--from", str(start)]
    arguments += ["--before-rollback"] * before_rollback
    arguments += [] if out is None else ["--out", str(out)]
    arguments += ["--json"] if as_json else []
    run_ranks("bigbatch.trainers.replay", arguments, None, 1)
