"""`bigbatch advise`: batch size, learning rate and number of GPUs, from measurements."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bigbatch.configs.errors import UserError, reason_of
from bigbatch.launcher.cli import options

if TYPE_CHECKING:  # they import numpy and pydantic
    from bigbatch.configs.rundir import RunDir
    from bigbatch.trainers.advice.advise import RunAdvice

_UNITS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


@click.command(short_help="Advise on batch size, learning rate and GPUs.")
@click.argument("run", required=False)
@click.option("--points", type=click.Path(path_type=Path), help="CSV of batches and their costs.")
@click.option("--transfer", metavar="RECIPE", help="How to train on from the weights of a recipe.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Of that recipe.")
@click.option(
    "--samples", type=click.IntRange(2), default=2000, show_default=True, help="Looked at."
)
@click.option(
    "--small",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Training samples of a class below which data is small.",
)
@click.option("--hold-out", help="A:B, points with a batch size from A to B are only predicted.")
@click.option("--target-time", help="Such as 90min, 12h or 2d: the fewest GPUs that meet it.")
@click.option("--lr-rule", type=click.Choice(["linear", "sqrt"]), help="Default: by optimizer.")
@click.option("--phases", type=click.IntRange(1), help="Equal parts; default: cycles, or 3.")
@click.option("--bandwidth", type=float, default=12.5, show_default=True, help="GB/s of a link.")
@click.option("--latency", type=float, default=20, show_default=True, help="Microseconds a hop.")
@click.option("--parameters", type=click.IntRange(1), help="Default: counted in its weights.")
@click.option("--max-gpus", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--schedule", is_flag=True, help="A batch for each phase, on --gpus GPUs.")
@click.option("--gpus", type=click.IntRange(1), help="Of --schedule; default: as many as it had.")
@click.option("--write", type=click.Path(path_type=Path), help="Recipe to write, of --schedule.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture to write: .png, .svg, .pdf")
@options.runs_folder
@options.as_json
def advise(
    run: str | None,
    points: Path | None,
    transfer: str | None,
    overrides: tuple[str, ...],
    samples: int,
    small: int,
    hold_out: str | None,
    target_time: str | None,
    lr_rule: Any,
    phases: int | None,
    bandwidth: float,
    latency: float,
    parameters: int | None,
    max_gpus: int,
    schedule: bool,
    gpus: int | None,
    write: Path | None,
    plot: Path | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Advise from RUN, a name or a directory, from measured points, or on transfer.

    \b
    bigbatch advise digits --target-time 2min
    bigbatch advise digits --schedule --gpus 16 --write grown.yaml
    bigbatch advise --points epochs.csv --hold-out 8192:49152
    bigbatch advise --transfer mine.yaml --set model.pretrained=true

    Of a run: the critical batch size by phase, from recorded gradient norms, and for each
    number of GPUs the fastest batch size, its learning rate, and the time it would take. With
    --schedule: the fastest batch of each phase on one number of GPUs, an optimizer, steps and
    time. Of --transfer: what to freeze, by the size of the training data and how well the
    pretrained network's features tell its classes apart.
    """
    if sum(given is not None for given in (run, points, transfer)) != 1:
        raise UserError("name one of a RUN, --points FILE.csv and --transfer RECIPE")
    _check_options("RUN" if run else "--points" if points else "--transfer")
    if transfer is not None:
        from bigbatch.configs.load import load_recipe
        from bigbatch.data.measured import measured_keys
        from bigbatch.launcher.cli.inference import start_of_recipe

        loaded = load_recipe(transfer, overrides)  # before torch takes its seconds
        overrides = (*overrides, *measured_keys(loaded))
        more = {"samples": samples, "small": small}
        start_of_recipe("transfer", transfer, overrides, None, None, as_json, **more)
        return
    options.check_picture(plot)
    if not (0 < bandwidth < math.inf and 0 <= latency < math.inf):
        raise UserError(
            f"--bandwidth {bandwidth:g} must be above 0 and --latency {latency:g} at least 0"
        )
    from bigbatch.launcher.cli import advice_words as words
    from bigbatch.launcher.cli.render import show
    from bigbatch.trainers.advice import advise as work
    from bigbatch.trainers.advice import advise_plot
    from bigbatch.trainers.advice.points import advise_points

    if points is not None:
        fit = advise_points(points, _range(hold_out))
        if plot is not None:
            options.write_picture(plot, lambda: advise_plot.draw_points(fit, plot))
        if as_json:
            options.print_json(words.points_values(fit))
        else:
            show(*words.points_tables(fit))
            for line in words.points_notes(fit):
                options.say(line)
            if plot is not None:
                options.say(plot)
        return
    from bigbatch.launcher.runs.registry import find_run

    assert run is not None
    if not schedule and (gpus is not None or write is not None):
        raise UserError("--gpus and --write are for a schedule; add --schedule, or leave them out")
    if schedule and target_time is not None:
        raise UserError(
            "--target-time asks for a number of GPUs, and --schedule is for one; name it by --gpus"
        )
    target_s = _seconds(target_time)
    directory = find_run(run, runs_folder)
    found = work.advise_run(
        directory,
        work.Cluster(bandwidth * 1e9, latency * 1e-6),
        rule=lr_rule,
        phases=phases,
        parameters=parameters,
        max_gpus=max_gpus,
    )
    if schedule:
        _schedule(found, directory, gpus or found.measured_ranks, write, as_json)
        return
    chosen = next((c for c in found.choices if target_s and c.seconds <= target_s), None)
    if plot is not None:
        options.write_picture(plot, lambda: advise_plot.draw_run(found, plot))
    if as_json:
        options.print_json(words.run_values(found, target_s, chosen))
    else:
        show(*words.run_tables(found, chosen))
        for line in words.run_notes(found, target_s, chosen):
            options.say(line)
        if plot is not None:
            options.say(plot)


def _schedule(
    found: "RunAdvice", run: "RunDir", gpus: int, write: Path | None, as_json: bool
) -> None:
    from bigbatch.configs.load import dump_recipe
    from bigbatch.launcher.cli import advice_words as words
    from bigbatch.launcher.cli.render import show
    from bigbatch.trainers.advice.schedule import advise_schedule

    plan = advise_schedule(found, run.recipe(), gpus)
    if write is not None:
        try:
            with write.open("x", encoding="utf-8") as file:  # nothing is ever overwritten
                file.write(dump_recipe(plan.recipe))
        except OSError as error:
            raise UserError(
                f"--write {write}: {reason_of(error)}; name a file that is not there yet"
            ) from None
    if as_json:
        options.print_json(words.schedule_values(plan) | {"written": write and str(write)})
        return
    show(words.schedule_table(plan))
    for line in words.schedule_notes(plan):
        options.say(line)
    if write is not None:
        options.say(f"{write}: `bigbatch check {write}` says what a run of it will do")


_OF = {  # options that only one kind of advice reads
    "--points": ("hold_out",),
    "RUN": (
        "target_time",
        "lr_rule",
        "phases",
        "bandwidth",
        "latency",
        "parameters",
        "max_gpus",
        "schedule",
        "gpus",
        "write",
    ),
    "--transfer": ("overrides", "samples", "small"),
}


def _check_options(asked: str) -> None:
    """Raise UserError for an option that the advice asked for does not read."""
    context = click.get_current_context()
    names = {"overrides": "set"}
    for kind, options_of in _OF.items():
        given = [
            "--" + names.get(name, name).replace("_", "-")
            for name in options_of
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        ]
        if given and kind != asked:
            belongs, here = (f"a {k}" if k == "RUN" else k for k in (kind, asked))
            raise UserError(
                f"{', '.join(given)}: read for advice from {belongs}, and this is from {here}; "
                "leave that out"
            )
    if asked == "--transfer" and context.params.get("plot") is not None:
        raise UserError("--plot draws batch sizes, and --transfer has none; leave it out")


def _range(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"--hold-out {text!r} is not A:B with A <= B, such as 8192:49152")
    return float(match[1]), float(match[2])


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)", text)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--target-time {text!r} is no time such as 30s, 90min, 12h or 2d")
    return float(match[1]) * _UNITS[match[2]]
