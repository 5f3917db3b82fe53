"""Commands for what comes after training: scores of a split, and predictions."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bigbatch.launcher.cli import options

if TYPE_CHECKING:
    from bigbatch.configs.data import Data

_TTA = ("none", "flip", "five", "ten", "scales")


def _shared(function: Any) -> Any:
    for option in (
        options.members,
        click.option(
            "--tta",
            type=click.Choice(_TTA),
            default="none",
            show_default=True,
            help="Looks at each image, whose probabilities are averaged.",
        ),
        click.option("--batch", type=click.IntRange(1), help="Images of a batch, on each process."),
        click.option(
            "--nproc", type=click.IntRange(1), help="Processes here; default: one per GPU."
        ),
        options.runs_folder,
        options.as_json,
    ):
        function = option(function)

    @functools.wraps(function)
    def command(**given: Any) -> None:
        from bigbatch.launcher.env import find_peers
        from bigbatch.launcher.start import one_voice

        with one_voice(find_peers(os.environ)):
            function(**given)

    return command


_mc_dropout = click.option(
    "--mc-dropout",
    type=click.IntRange(1),
    metavar="K",
    help="K passes that drop at random, as in training, whose probabilities are averaged.",
)


@click.command(short_help="Score a run or an ensemble on a split.")
@click.argument("models", nargs=-1, required=True, metavar="RUN|FOLDER...")
@click.option("--data", help="Folder or URL of shards; default: that of the recipe.")
@click.option("--split", help="Folder below it; default: the recipe's test split, or else val.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the figures; default: in the run."
)
@_mc_dropout
@_shared
def evaluate(
    models: tuple[str, ...],
    data: str | None,
    split: str | None,
    out: Path | None,
    members: str,
    tta: str,
    mc_dropout: int | None,
    batch: int | None,
    nproc: int | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Score the members of RUN, and their ensemble, on any split: each image once.

    \b
    bigbatch evaluate digits
    bigbatch evaluate digits --split val --members all --json

    FOLDER is what `bigbatch ensemble` has written; several runs are one ensemble.
    """
    paths = _find(models, runs_folder)
    source = _source(paths[0], data, split)
    out = out or paths[0] / "evaluations" / Path(source).absolute().name
    _say_other_data(paths, data, source)
    _start(
        "evaluate", paths, source, out, members=members, tta=tta, batch=batch, nproc=nproc,
        as_json=as_json, more=_passes(mc_dropout),
    )  # fmt: skip


@click.command(short_help="Predict the classes of images.")
@click.argument("model", metavar="RUN|FOLDER")
@click.argument("source")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="FILE.parquet or FILE.csv."
)
@click.option("--features", is_flag=True, help="Also what goes into the classifier.")
@_mc_dropout
@_shared
def predict(
    model: str,
    source: str,
    out: Path,
    features: bool,
    members: str,
    tta: str,
    mc_dropout: int | None,
    batch: int | None,
    nproc: int | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Predict every image of SOURCE, labelled or not: a row each, in the order of SOURCE.

    \b
    bigbatch predict digits photos/ --out labels.parquet
    bigbatch predict digits list.txt --out labels.csv

    SOURCE is a folder of images, a folder of shards or of other tars, one tar or image, or a
    .txt file with a path on each line. An image that cannot be read is a row with a reason.
    """
    _check_new_table(out)
    _start(
        "predict", _find([model], runs_folder), source, out, members=members, tta=tta, batch=batch,
        nproc=nproc, as_json=as_json, more=[*_passes(mc_dropout), *["--features"] * features],
    )  # fmt: skip


@click.command(short_help="Features of images by a pretrained network.")
@click.argument("recipe")
@click.argument("source")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="FILE.parquet or FILE.csv."
)
@click.option("--batch", type=click.IntRange(1), help="Images of a batch, on each process.")
@click.option("--nproc", type=click.IntRange(1), help="Processes here; default: one per GPU.")
@options.as_json
def features(
    recipe: str,
    source: str,
    overrides: tuple[str, ...],
    out: Path,
    batch: int | None,
    nproc: int | None,
    as_json: bool,
) -> None:
    """Write what the network of RECIPE makes of every image of SOURCE, without training it.

    \b
    bigbatch features digits photos/ model.pretrained=true data.channels=3 --out features.parquet
    bigbatch features mine.yaml shards/mine/train model.checkpoint=w.safetensors --out f.parquet

    Weights are those that RECIPE starts from (model.pretrained, model.checkpoint); of a run that
    was trained here, `predict --features` gives them. Rows are those of SOURCE, in its order.
    """
    from bigbatch.configs.load import load_recipe
    from bigbatch.data.measured import measured_keys

    _check_new_table(out)
    loaded = load_recipe(recipe, overrides)  # before torch takes its seconds
    overrides = (*overrides, *measured_keys(loaded))
    start_of_recipe("features", recipe, overrides, batch, nproc, as_json, out=out, source=source)


def start_of_recipe(
    command: str,
    recipe: str,
    overrides: Sequence[str],
    batch: int | None,
    nproc: int | None,
    as_json: bool,
    **more: object,
) -> None:
    """Start ranks of a command of trainers/inference/pretrained.py; does not return."""
    from bigbatch.launcher.env import find_peers
    from bigbatch.launcher.ranks import run_ranks
    from bigbatch.launcher.start import one_voice
    from bigbatch.trainers.planning.environment import check_environment

    check_environment(os.environ)
    arguments = [command, recipe, *(f"--set={override}" for override in overrides)]
    arguments += [f"--{key}={value}" for key, value in more.items()]
    arguments += ["--batch", str(batch)] if batch else []
    arguments += ["--json"] if as_json else []
    peers = find_peers(os.environ)
    with one_voice(peers):
        run_ranks("bigbatch.trainers.inference", arguments, peers, nproc)


def _check_new_table(out: Path) -> None:
    """Raise UserError where a new Parquet or CSV file cannot be made."""
    from bigbatch.configs.errors import UserError

    if out.suffix not in (".parquet", ".csv"):
        raise UserError(f"--out {out}: the name must end in .parquet or .csv")
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; choose another --out, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.parent} is no folder; make it, or choose another --out")


@click.command(short_help="Make one ensemble of runs.")
@click.argument("models", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="New folder for the ensemble."
)
@click.option(
    "--combine",
    type=click.Choice(
        ("mean", "logits", "weights", "greedy", "vote", "stack", "boost", "features")
    ),
    default="mean",
    show_default=True,
    help="How the members' outputs become one; docs/ensembles.md explains each.",
)
@click.option(
    "--soup",
    type=click.Choice(("greedy", "uniform")),
    help="Average the weights into one model instead: of members that share a trunk.",
)
@click.option(
    "--margin",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="A run takes part if its accuracy is this near the best one's.",
)
@click.option(
    "--coverage", type=click.FloatRange(0, 1), help="Reject the least certain beyond this share."
)
@click.option("--data", help="Folder or URL of shards; default: that of the recipe.")
@click.option("--fit", help="Split that decides; default: the recipe's val.")
@click.option("--split", help="Split that is reported; default: the recipe's test split.")
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the folds.")
@_shared
def ensemble(
    models: tuple[str, ...],
    out: Path,
    combine: str,
    soup: str | None,
    margin: float,
    coverage: float | None,
    data: str | None,
    fit: str | None,
    split: str | None,
    folds: int,
    seed: int,
    members: str,
    tta: str,
    batch: int | None,
    nproc: int | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Combine the members of RUNs into one ensemble, a folder that evaluate and predict take.

    \b
    bigbatch ensemble digits digits-2 digits-3 --out ensembles/digits
    bigbatch ensemble digits --members all --combine greedy --out ensembles/snapshots
    bigbatch ensemble digits --members all --soup greedy --out ensembles/soup

    The validation split decides which members take part, with which weights and temperature, and
    its figures are cross-fitted; the test split only is reported.
    """
    from bigbatch.configs.errors import UserError

    if os.path.lexists(out):
        raise UserError(f"{out} exists already; choose another --out")
    if not 0 <= margin <= 1:  # NaN is no number that click refuses
        raise UserError(f"--margin {margin}: it is a difference of accuracies, from 0 to 1")
    if coverage is not None and not 0 < coverage <= 1:
        raise UserError(f"--coverage {coverage}: it is a share of samples, above 0, at most 1")
    paths = _find(models, runs_folder)
    recipe = _data(paths[0])
    root = (data or recipe.path).rstrip("/")
    source = f"{root}/{fit or recipe.val}"
    test = split or _test_split(recipe, root)
    _say_other_data(paths, data, source)
    more = ["--combine", combine, "--margin", str(margin), "--folds", str(folds)]
    more += ["--seed", str(seed)]
    more += [] if soup is None else ["--soup", soup]
    more += [] if coverage is None else ["--coverage", str(coverage)]
    more += [] if test is None else ["--report", f"{root}/{test}"]
    _start(
        "ensemble", paths, source, out, members=members, tta=tta, batch=batch, nproc=nproc,
        as_json=as_json, more=more,
    )  # fmt: skip


def _passes(mc_dropout: int | None) -> list[str]:
    return [] if mc_dropout is None else ["--mc-dropout", str(mc_dropout)]


def _find(models: Sequence[str], runs_folder: Path) -> list[Path]:
    from bigbatch.launcher.runs.registry import find_model

    return [find_model(model, runs_folder) for model in models]


def _source(path: Path, data: str | None, split: str | None) -> str:
    """The shards to score: by the options, or by the recipe of the run, or of the first member."""
    if data is not None and split is None:
        return data
    recipe = _data(path)
    root = data or recipe.path
    return f"{root.rstrip('/')}/{split or _test_split(recipe, root) or recipe.val}"


def _test_split(data: "Data", root: str) -> str | None:
    """The test split, as a run has it: the one of the usual name may be missing on this machine."""
    from bigbatch.data.staging import is_url

    usual = data.test == type(data).model_fields["test"].default
    missing = usual and not is_url(root) and not (Path(root) / str(data.test)).exists()
    return None if missing else data.test


def _say_other_data(paths: Sequence[Path], data: str | None, source: str) -> None:
    """Say where runs were trained on other data than the first, whose data all are judged on."""
    from bigbatch.configs.notices import notice
    from bigbatch.launcher.env import find_peers
    from bigbatch.launcher.start import should_report

    if data is not None or not should_report(find_peers(os.environ)):
        return
    named = [(path, _data(path)) for path in paths]
    said = [f"{d.path} (val: {d.val}, test: {d.test})" for _, d in named]
    for (path, _), its in zip(named, said, strict=True):
        if its != said[0]:
            notice(
                f"{path} was trained on {its}, {paths[0]} on {said[0]}; all are judged on "
                f"{source}: see that none was trained on it"
            )


def _data(path: Path) -> "Data":
    """The data that a run was trained on, or an ensemble's first member."""
    from bigbatch.configs.errors import UserError
    from bigbatch.configs.load import parse_recipe, read_yaml

    file = path / "recipe.yaml"
    file = file if file.is_file() else path / "members" / "00.yaml"
    if not file.is_file():
        raise UserError(f"{path} holds neither recipe.yaml nor members; name the data with --data")
    return parse_recipe(read_yaml(file), str(file)).data


def _start(
    command: str,
    paths: Sequence[Path],
    source: str,
    out: Path,
    *,
    members: str,
    tta: str,
    batch: int | None,
    nproc: int | None,
    as_json: bool,
    more: Sequence[str] = (),
) -> None:
    from bigbatch.configs.files import check_writable
    from bigbatch.launcher.env import find_peers
    from bigbatch.launcher.ranks import run_ranks
    from bigbatch.trainers.planning.environment import check_environment

    check_environment(os.environ)
    check_writable(out)
    arguments = [command, *map(str, paths), "--source", source, "--members", members, "--tta", tta]
    arguments += ["--out", str(out)]
    arguments += ["--batch", str(batch)] if batch else []
    arguments += ["--json"] if as_json else []
    arguments += more
    run_ranks("bigbatch.trainers.inference", arguments, find_peers(os.environ), nproc)
