"""The command that says what each sample came to over a run's training."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from bigbatch.launcher.cli import options

if TYPE_CHECKING:
    from bigbatch.configs.rundir import RunDir
    from bigbatch.trainers.dynamics.tell import Wanted

_WAYS = ("errors", "forgotten", "ambiguous")  # of trainers/dynamics/study.py


@click.command(short_help="Which samples a run forgot, never learned, or has mislabelled.")
@click.argument("run")
@click.option("--until", type=click.IntRange(1), help="Only the visits up to this step.")
@click.option(
    "--top", type=click.IntRange(0), default=12, show_default=True, help="Ranks to print."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="New folder: page, pictures of probable label errors, data map, a table of all samples.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a weight for each sample, for data.sampling weights: .parquet or .csv.",
)
@click.option(
    "--weigh",
    type=click.Choice(_WAYS),
    default="errors",
    show_default=True,
    help="errors: 0 for probable label errors; forgotten: 1 + times forgotten; ambiguous: the "
    "variability of p(true).",
)
@click.option(
    "--drop",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="With --weigh errors: the share of samples that gets 0.",
)
@click.option(
    "--clean",
    is_flag=True,
    help="By the checkpoints and snapshots that RUN kept, on each sample as evaluations see it.",
)
@click.option("--batch", type=click.IntRange(1), help="With --clean: images of a batch.")
@click.option("--nproc", type=click.IntRange(1), help="With --clean: processes here.")
@options.runs_folder
@options.as_json
def samples(
    run: str,
    until: int | None,
    top: int,
    out: Path | None,
    weights: Path | None,
    weigh: str,
    drop: float | None,
    clean: bool,
    batch: int | None,
    nproc: int | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Read what RUN recorded of its samples (log.samples=true), and rank probable label errors.

    \b
    bigbatch samples digits --out digits-samples
    bigbatch samples digits --weights clean.parquet --drop 0.05
    bigbatch samples digits --clean

    By mean margin over all visits, the lowest first. --clean needs no record: the weights that RUN
    kept look at each training sample once more, without mixing or random crops, which tells errors
    apart where mixup was on. RUN is only read.
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.configs.files import check_writable
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.trainers.dynamics.look import look
    from bigbatch.trainers.dynamics.tell import Wanted, tell

    if not clean and (batch or nproc):
        raise UserError("--batch and --nproc are of --clean; what was recorded is only read")
    if weights is None and (drop is not None or weigh != "errors"):
        raise UserError("--weigh and --drop say which --weights are written; name their file")
    if drop is not None and weigh != "errors":
        raise UserError(f"--drop is of --weigh errors, not of {weigh}; leave it out")
    if weights is not None and weigh == "errors" and drop is None:
        raise UserError(
            "--weights of --weigh errors: say by --drop which share of samples gets 0; no figure "
            "of a run tells errors from hard samples, so look at the pictures of --out first"
        )
    if weights is not None and weights.suffix not in (".parquet", ".csv"):
        raise UserError(f"--weights {weights}: the name must end in .parquet or .csv")
    found = find_run(run, runs_folder)
    for path in (out, weights):
        if path is not None and path.resolve().is_relative_to(found.path.resolve()):
            raise UserError(f"{path} is in the run, which is only read; choose another place")
    for path, option in ((out, "--out"), (weights, "--weights")):
        if path is not None and path.exists():
            raise UserError(f"{path} exists already; choose another {option}, or remove it")
    if out is not None:
        check_writable(out)
    wanted = Wanted(top, out, weights, weigh, drop, as_json)
    if clean:
        _look_clean(found, until, wanted, batch, nproc)
    tell(look(found, until), wanted)


def _look_clean(
    run: "RunDir", until: int | None, wanted: "Wanted", batch: int | None, nproc: int | None
) -> NoReturn:
    """Become the ranks that look."""
    from bigbatch.configs.decisions import recipe_of
    from bigbatch.launcher.env import find_peers
    from bigbatch.launcher.ranks import run_ranks
    from bigbatch.launcher.start import one_voice
    from bigbatch.trainers.dynamics.clean import kept_weights
    from bigbatch.trainers.planning.environment import check_environment

    data = recipe_of(run).data
    arguments = ["samples", str(run.path), "--source", f"{data.path.rstrip('/')}/{data.train}"]
    arguments += [
        "--members",
        ",".join(kept_weights(run, until).values()),
        "--top",
        str(wanted.top),
    ]
    given = {name: getattr(wanted, name) for name in ("out", "weights", "drop")} | {"batch": batch}
    for name, value in given.items():
        arguments += [] if value is None else [f"--{name}", str(value)]
    arguments += ["--weigh", wanted.weigh, *["--json"] * wanted.as_json]
    check_environment(os.environ)
    peers = find_peers(os.environ)
    with one_voice(peers):
        run_ranks("bigbatch.trainers.inference", arguments, peers, nproc)
