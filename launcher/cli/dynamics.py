"""The command that says what each sample came to over a run's training."""

from pathlib import Path

import click

from bigbatch.launcher.cli import options

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
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Read what RUN recorded of its samples (log.samples=true), and rank probable label errors.

    \b
    bigbatch samples digits --out digits-samples
    bigbatch samples digits --weights clean.parquet --drop 0.05

    By mean margin over all visits, the lowest first. RUN is only read.
    """
    from bigbatch.configs.errors import UserError
    from bigbatch.configs.files import check_writable
    from bigbatch.launcher.runs.registry import find_run
    from bigbatch.trainers.dynamics.look import in_words, look

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
    looked = look(found, until)
    result = looked.summary(top)
    if weights is not None:
        from bigbatch.trainers.dynamics.files import write_weights
        from bigbatch.trainers.dynamics.study import weights as weigh_samples

        values = weigh_samples(looked.found, weigh, drop or 0.0)
        write_weights(weights, looked, values)
        result["weights"] = {"file": str(weights), "zero": int((values == 0).sum())}
    if out is not None:
        from bigbatch.trainers.dynamics.files import PAGE, write_folder

        try:
            write_folder(out, looked, result)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error}") from None
        result["out"] = str(out)
    if as_json:
        options.print_json(result)
        return
    for line in in_words(result):
        options.say(line)
    if result["label_errors"]:
        options.say("\nprobable label errors, the lowest mean margins first:")
        width = max(3, *(len(row["key"]) for row in result["label_errors"]))
        options.say(f"{'key':{width}}  margin  p(true)  right  forgotten  class")
        for row in result["label_errors"]:
            options.say(
                f"{row['key']:{width}}  {row['margin']:6.2f}  {row['confidence']:7.3f}  "
                f"{row['right']:5.0%}  {row['forgotten']:9}  {row['class']}"
            )
    if weights is not None:
        options.say(f"weights {weights}, {result['weights']['zero']:,} of them 0")
    if out is not None:
        options.say(f"page {out / PAGE}")
