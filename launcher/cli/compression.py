"""`bigbatch compress`: smaller and faster forms of a trained network."""

import os
import sys
from pathlib import Path

import click

from bigbatch.launcher.cli import options


@click.command(short_help="Make a trained network smaller and faster.")
@click.argument("model", metavar="RUN|FOLDER")
@click.option(
    "--method",
    required=True,
    metavar="METHOD,...",
    help="prune, structured, lowrank, int8 or codebook; several are compared.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new FOLDER.")
@click.option("--members", default="auto", show_default=True, help="Which one of the run.")
@click.option(
    "--share",
    metavar="SHARE,...",
    help="Of weights (prune, lowrank) or channels (structured) that go; default: 0.5.",
)
@click.option(
    "--energy",
    metavar="SHARE,...",
    help="lowrank: of each layer's squared singular values that stay, in place of --share.",
)
@click.option("--bits", metavar="BITS,...", help="codebook: of each weight; default: 5.")
@click.option(
    "--importance",
    type=click.Choice(("magnitude", "taylor")),
    help="prune, structured: by what a weight or channel is scored; default: magnitude.",
)
@click.option(
    "--finetune",
    metavar="LENGTH",
    help="Train further, such as '2 epochs': prune, structured and lowrank.",
)
@click.option(
    "--finetune-lr", type=float, metavar="FACTOR", help="Of the recipe's rate; default: 0.1."
)
@click.option(
    "--images", type=click.IntRange(1), help="Of the training split, to score and to calibrate."
)
@click.option(
    "--calibration",
    type=click.Choice(("minmax", "entropy", "percentile")),
    help="int8: how ranges are found; default: minmax.",
)
@click.option("--rounds", type=click.IntRange(1), default=50, show_default=True, help="Of timing.")
@options.runs_folder
@options.as_json
def compress(
    model: str,
    method: str,
    out: Path,
    members: str,
    share: str | None,
    energy: str | None,
    bits: str | None,
    importance: str | None,
    finetune: str | None,
    finetune_lr: float | None,
    images: int | None,
    calibration: str | None,
    rounds: int,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Compress one member of RUN by one method or more, and measure what that costs.

    \b
    bigbatch compress digits --method int8 --out small
    bigbatch compress digits --members cycle-03 --method prune,structured,lowrank,codebook \\
        --share 0.5,0.75 --bits 3,5 --finetune "2 epochs" --out small

    FOLDER/compression.json and pareto.png hold size, accuracy before and after, and latency at
    batch 1 and 64 on this machine. Each result has a folder of its own below, which `bigbatch
    evaluate`, `predict` and `export` take; that of int8 holds model.onnx.
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.launcher.launchers import python
    from bigbatch.launcher.runs.registry import find_model
    from bigbatch.trainers.compress.variants import FINE_TUNED, SCORED, make_variants

    methods = {variant.method for variant in make_variants(method, share, energy, bits)}
    for option, value, users in (
        ("--importance", importance, SCORED),
        ("--finetune", finetune, FINE_TUNED),
        ("--calibration", calibration, ("int8",)),
    ):
        if value is not None and not methods & {*users}:
            raise UserError(
                f"{option} {value} is for {', '.join(users)}; leave it out, or add such a --method"
            )
    if images is not None and importance != "taylor" and "int8" not in methods:
        raise UserError(f"--images {images} is for int8 and --importance taylor; leave it out")
    if finetune_lr is not None and (finetune is None or not 0 < finetune_lr <= 10):
        raise UserError(
            f"--finetune-lr {finetune_lr:g} multiplies the rate of --finetune: give a length too, "
            "and a factor above 0 and up to 10"
        )
    if finetune is not None:
        _check_length(finetune)
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    path = find_model(model, runs_folder)
    given = {
        "--method": method, "--out": out, "--members": members, "--share": share,
        "--energy": energy, "--bits": bits, "--importance": importance, "--finetune": finetune,
        "--finetune-lr": finetune_lr, "--images": images, "--calibration": calibration,
        "--rounds": rounds,
    }  # fmt: skip
    command = [*python("bigbatch.trainers.compress"), str(path)]
    command += [f"{option}={value}" for option, value in given.items() if value is not None]
    command += ["--json"] if as_json else []
    sys.stdout.flush()
    os.execv(command[0], command)


def _check_length(text: str) -> None:
    from bigbatch.configs.durations import parse
    from bigbatch.configs.errors import UserError

    try:
        length = parse(text)
    except ValueError as error:
        raise UserError(f"--finetune: {error}") from None
    if length.value == 0:
        raise UserError(f"--finetune {length} is no time at all; leave it out")
