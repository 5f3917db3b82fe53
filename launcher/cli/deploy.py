"""Commands that turn what was trained into files for others."""

import os
import sys
from pathlib import Path

import click

from bigbatch.launcher.cli import options


@click.command(short_help="Write a run or an ensemble as one file for others.")
@click.argument("model", metavar="RUN|FOLDER")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="FILE.onnx, FILE.pt2 or FILE.safetensors.",
)
@options.members
@click.option("--check", is_flag=True, help="Run it by itself, and compare with evaluation.")
@click.option("--data", help="With --check: folder or URL of shards; default: the recipe's.")
@click.option(
    "--images",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="With --check: at most so many of the validation split.",
)
@options.runs_folder
@options.as_json
def export(
    model: str,
    out: Path,
    members: str,
    check: bool,
    data: str | None,
    images: int,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Write RUN, or an ensemble's FOLDER, as one file that needs nothing of this product.

    \b
    bigbatch export digits --out digits.onnx --check
    bigbatch export digits --members soup --out model.safetensors

    .onnx and .pt2 take uint8 pixels of any size and give probabilities: crop, resizing and
    normalisation, all members and the temperature are inside. .safetensors holds the weights of
    one network, with a config that timm reads. A model card is written beside.

    With --check the file is run over validation images in a process that knows nothing of this
    product; exit status 1 where a probability differs by more than 1e-4 from evaluation's. A
    file that is there already is then checked as it is.
    """
    from bigbatch.launcher.launchers import python
    from bigbatch.launcher.runs.registry import find_model

    path = str(find_model(model, runs_folder))
    command = [*python("bigbatch.trainers.export"), path, "--out", str(out)]
    command += ["--members", members, "--images", str(images)]
    command += ["--check"] if check else []
    command += ["--data", data] if data else []
    command += ["--json"] if as_json else []
    sys.stdout.flush()
    os.execv(command[0], command)
