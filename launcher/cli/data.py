"""Commands about data: shards, their index, and the order in which training reads them."""

import signal
import sys
from pathlib import Path

import click

from bigbatch.launcher.cli import options


@click.command(short_help="Write images as shards with an index.")
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--split", help="Fractions of train, val and test, such as 0.8,0.1,0.1.")
@click.option("--samples-per-shard", type=int, help="Samples in a shard.  [default: 10000]")
@click.option("--shard-size", help="Instead, about this many bytes in a shard, such as 256MB.")
@click.option("--short-side", type=int, help="Reduce images to this short side, in pixels.")
@click.option("--quality", type=int, default=90, show_default=True, help="Of JPEGs reduced.")
@click.option("--image-column", help="Of Parquet and saved data sets, where it is unclear.")
@click.option("--label-column", help="The same for labels; of tars, the entry of KEY.json.")
@click.option("--target", help="The column of numbers, or lists of them, to learn; likewise.")
@click.option(
    "--kind",
    type=click.Choice(["images", "tars", "parquet", "dataset"]),
    help="What to read of a folder that holds several of them.",
)
@click.option("--workers", type=int, default=1, show_default=True, help="Processes.")
@options.as_json
def shard(
    source: str,
    dest: Path,
    split: str | None,
    samples_per_shard: int | None,
    shard_size: str | None,
    short_side: int | None,
    quality: int,
    image_column: str | None,
    label_column: str | None,
    target: str | None,
    kind: str | None,
    workers: int,
    as_json: bool,
) -> None:
    """Write SOURCE as WebDataset shards with an index: DEST/SPLIT/000000.tar, DEST/SPLIT/index.

    \b
    SOURCE is  digits                 scikit-learn's handwritten digits
               a folder               one folder of images per class, or SPLIT/CLASS/image
               Parquet, saved Hugging Face data sets, WebDataset tars

    Killed, it goes on where it was when the command is repeated.
    """
    from dataclasses import asdict

    from bigbatch.data.writing.shard import shard as write
    from bigbatch.data.writing.skips import count_skips, describe

    try:
        written = write(
            source,
            dest,
            split=split,
            samples_per_shard=samples_per_shard,
            shard_size=shard_size,
            short_side=short_side,
            quality=quality,
            image_column=image_column,
            label_column=label_column,
            kind=kind,
            target=target,
            workers=workers,
            progress=not as_json,
        )
    except KeyboardInterrupt:
        options.say("bigbatch: stopped; repeat the command to go on where it was", err=True)
        sys.exit(128 + signal.SIGINT)
    if as_json:
        options.print_json(asdict(written))
        return
    for name, count in written.samples.items():
        shards = options.plural(written.shards[name], "shard")
        options.say(f"{dest / name}  {options.plural(count, 'sample')} in {shards}")
    classes = options.plural(written.classes, "class")
    options.say(f"{classes}, {written.bytes:,} bytes, {written.seconds:.1f} s")
    rows = count_skips(written.skipped)
    for row in rows[:20]:
        options.say(f"left out: {describe(row)}", err=True)
    if len(rows) < len(written.skipped) or len(rows) > 20:
        options.say(f"each by its name: {dest / 'skipped.txt'}", err=True)
    for note in written.notes:
        options.say(f"warning: {note}", err=True)


@click.command(short_help="Index WebDataset tars that exist.")
@click.argument("shards")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option("--skip-bad", is_flag=True, help="Leave out samples with a problem.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for copies of remote tars.")
@click.option("--cache-gb", type=float, default=100.0, show_default=True, help="Its size.")
@options.as_json
def index(
    shards: str, workers: int, skip_bad: bool, cache: Path | None, cache_gb: float, as_json: bool
) -> None:
    """Index the tars in SHARDS, one split of a data set: a folder, or its URL.

    Reads every byte and checks each archive. The index is written beside the tars. Exit status 1
    where samples have problems; then nothing is written.
    """
    from bigbatch.data.classes import UNLABELLED
    from bigbatch.data.index import BadShards, build_index
    from bigbatch.data.remote import remote_at
    from bigbatch.data.remote_index import build_remote_index
    from bigbatch.data.staging import is_url

    try:
        if is_url(shards):
            remote = remote_at(shards, cache, cache_gb)
            made = build_remote_index(remote, workers=workers, skip_bad=skip_bad)
        else:
            made = build_index(Path(shards), workers=workers, skip_bad=skip_bad)
    except BadShards as error:
        options.say(f"bigbatch: {error}", err=True)
        sys.exit(1)
    empty = [n for n, c in zip(made.classes, made.class_counts.tolist(), strict=True) if c == 0]
    if as_json:
        options.print_json(
            {
                "path": made.place,
                "samples": len(made),
                "shards": len(made.shards),
                "classes": list(made.classes),
                "hash": made.hash,
                "problems": list(made.problems),
                "passed_over": made.passed_over,
                "empty_classes": empty,
                **({} if made.target is None else {"targets": made.target.shape[1]}),
            }
        )
        return
    targets = ""
    if made.target is not None:
        targets = f", with {options.plural(made.target.shape[1], 'target')} each"
    options.say(
        f"{made.place}  {options.plural(len(made), 'sample')} of "
        f"{options.plural(len(made.classes), 'class')} in "
        f"{options.plural(len(made.shards), 'shard')}{targets}"
    )
    for problem in made.problems:
        options.say(f"left out: {problem}", err=True)
    for what, count in made.passed_over.items():
        noun, _, which = what.partition("s ")  # members .txt, files .tgz
        options.say(f"passed over: {options.plural(count, noun)} {which}", err=True)
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        options.say(f"warning: classes without a sample: {shown}", err=True)
    if len(made.classes) - len(empty) == 1 and made.classes != UNLABELLED:
        options.say("warning: all samples are of one class", err=True)


@click.command(short_help="Describe shards: counts, labels, sizes, problems.")
@click.argument("shards", type=click.Path(path_type=Path), required=False)
@click.option("--verify", is_flag=True, help="Read and decode every image.")
@click.option(
    *("--plot", "--picture", "picture"),
    type=click.Path(path_type=Path),
    help="Draw labels, sizes and resolutions: .png, .svg, .pdf",
)
@click.option("--stats", is_flag=True, help="Instead: mean and std of the training pixels.")
@click.option("--pca", is_flag=True, help="The same, and the axes of Fancy PCA.")
@click.option(
    "--images", type=click.IntRange(0), help="That these measure; 0: all.  [default: 10000]"
)
@click.option("--channels", type=click.Choice(["1", "3"]), help="That these measure.")
@click.option("--journal", metavar="RUN", help="Instead: the samples that RUN could not read.")
@options.runs_folder
@options.as_json
def inspect(
    shards: Path | None,
    verify: bool,
    picture: Path | None,
    stats: bool,
    pca: bool,
    images: int | None,
    channels: str | None,
    journal: str | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Describe SHARDS, a data set or one split of it. Exit status 1 where it has problems.

    With --stats or --pca instead, the keys of a recipe that say what the pixels of its training
    split are like. With --journal RUN instead, which samples that run could not read, and what
    took their places.
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.launcher.cli import render

    measured = stats or pca
    if (shards is None) == (journal is None) or (
        bool(journal) + measured + bool(verify or picture)
    ) > 1:
        raise UserError(
            "inspect SHARDS, with --verify and --plot as you like; or inspect SHARDS --stats or "
            "--pca; or inspect --journal RUN"
        )
    if not measured and (images is not None or channels is not None):
        raise UserError("--images and --channels are for --stats and --pca; add one of them")
    if measured:
        assert shards is not None
        _measure(shards, pca, images, channels, as_json)
        return
    if journal is not None:
        from bigbatch.launcher.runs.bad_samples import describe
        from bigbatch.launcher.runs.registry import find_run

        said = describe(find_run(journal, runs_folder))
        if as_json:
            options.print_json(said)
        elif said["bad"]:
            render.show(*render.journal_tables(said))
        else:
            options.say(f"{said['run']} could read every sample")
        sys.exit(1 if said["bad"] else 0)

    from bigbatch.data.writing.inspection import inspect as look

    assert shards is not None
    found = look(shards, verify=verify, picture=picture)
    if as_json:
        options.print_json(found)
    else:
        render.show(*render.inspect_tables(found))
        for note in found["notes"]:
            options.say(f"warning: {note}", err=True)
        for problem in found["problems"]:
            options.say(f"problem: {problem}", err=True)
    sys.exit(1 if found["problems"] else 0)


def _measure(
    root: Path, pca: bool, images: int | None, channels: str | None, as_json: bool
) -> None:
    import os

    import yaml

    from bigbatch.data.writing.pixel_stats import IMAGES, measure

    found = measure(
        root,
        images=IMAGES if images is None else images,
        channels=int(channels) if channels else None,
        threads=len(os.sched_getaffinity(0)),
    )
    keys = found.recipe(pca=pca)
    if as_json:
        error = [float(value) for value in found.mean_error]
        counts = {"images": found.images, "of": found.of, "unreadable": found.unreadable}
        options.print_json({**keys, **counts, "mean_error": error})
        return
    options.say(
        f"# {found.images:,} of {options.plural(found.of, 'image')}; standard error of the mean "
        f"at most {found.mean_error.max():.1g}"
    )
    options.say(yaml.safe_dump(keys, default_flow_style=None, sort_keys=False, width=200), nl=False)
    if found.unreadable:
        options.say(
            f"warning: {options.plural(found.unreadable, 'image')} could not be read", err=True
        )


@click.command(short_help="Show the samples of each micro-batch, without training.")
@options.recipe
@click.option("--steps", required=True, help="A:B, from step A up to but not including B.")
@click.option("--world-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rank", type=int, help="Only this rank's micro-batches.")
@options.as_json
def batches(
    recipe: str,
    overrides: tuple[str, ...],
    steps: str,
    world_size: int,
    rank: int | None,
    as_json: bool,
) -> None:
    """Show keys, labels and epochs of each micro-batch that training on RECIPE reads.

    With --json one object a line: step, micro, rank, samples, keys, labels, epochs.
    """
    from dataclasses import asdict

    from bigbatch.configs.files import to_json
    from bigbatch.configs.load import load_recipe
    from bigbatch.launcher.batches import batches as compute
    from bigbatch.launcher.batches import parse_steps

    loaded = load_recipe(recipe, overrides)
    for batch in compute(loaded, parse_steps(steps), world_size, rank):
        if as_json:
            options.say(to_json(asdict(batch)))
            continue
        options.say(f"step {batch.step}, micro-batch {batch.micro}, rank {batch.rank}")
        for key, label, epoch in zip(batch.keys, batch.labels, batch.epochs, strict=True):
            options.say(f"  {key}  label {label}  epoch {epoch}")
