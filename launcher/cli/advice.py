"""`bigbatch advise`: batch size, learning rate and number of GPUs, from measurements."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bigbatch.configs.errors import UserError
from bigbatch.launcher.cli import options

if TYPE_CHECKING:  # it imports numpy
    from bigbatch.trainers.advice.advise import Choice, PointsAdvice, RunAdvice

_POOR = 0.25  # relative error of a fitted point from which the model is called wrong
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
    plot: Path | None,
    runs_folder: Path,
    as_json: bool,
) -> None:
    """Advise from RUN, a name or a directory, from measured points, or on transfer.

    \b
    bigbatch advise digits --target-time 2min
    bigbatch advise --points epochs.csv --hold-out 8192:49152
    bigbatch advise --transfer mine.yaml --set model.pretrained=true

    Of a run: the critical batch size by phase, from recorded gradient norms, and for each
    number of GPUs the fastest batch size, its learning rate, and the time it would take. Of
    --transfer: what to freeze, by the size of the training data and how well the pretrained
    network's features tell its classes apart.
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
    from bigbatch.launcher.cli.render import show
    from bigbatch.trainers.advice import advise as work
    from bigbatch.trainers.advice import advise_plot

    if points is not None:
        fit = work.advise_points(points, _range(hold_out))
        if plot is not None:
            options.write_picture(plot, lambda: advise_plot.draw_points(fit, plot))
        if as_json:
            options.print_json(points_values(fit))
        else:
            show(*points_tables(fit))
            for line in points_notes(fit):
                options.say(line)
            if plot is not None:
                options.say(plot)
        return
    from bigbatch.launcher.runs.registry import find_run

    assert run is not None
    target_s = _seconds(target_time)
    found = work.advise_run(
        find_run(run, runs_folder),
        work.Cluster(bandwidth * 1e9, latency * 1e-6),
        rule=lr_rule,
        phases=phases,
        parameters=parameters,
        max_gpus=max_gpus,
    )
    chosen = next((c for c in found.choices if target_s and c.seconds <= target_s), None)
    if plot is not None:
        options.write_picture(plot, lambda: advise_plot.draw_run(found, plot))
    if as_json:
        options.print_json(run_values(found, target_s, chosen))
    else:
        show(*run_tables(found, chosen))
        for line in run_notes(found, target_s, chosen):
            options.say(line)
        if plot is not None:
            options.say(plot)


_OF = {  # options that only one kind of advice reads
    "--points": ("hold_out",),
    "RUN": ("target_time", "lr_rule", "phases", "bandwidth", "latency", "parameters", "max_gpus"),
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


def run_values(
    found: "RunAdvice", target_s: float | None, chosen: "Choice | None"
) -> dict[str, Any]:
    """An advice in plain values. Batch sizes in samples, times in seconds."""
    from dataclasses import asdict

    curve, step = found.curve, found.step_time
    values: dict[str, Any] = {
        "run": found.name,
        "batch": found.batch,
        "lr": found.lr,
        "lr_rule": found.rule,
        "phases": [
            {
                "name": p.name,
                "steps": [p.first_step, p.last_step],
                "critical_batch": p.critical,
                "interval": p.critical_interval,
            }
            for p in found.phases
        ],
        "critical_batch": curve.critical,
        "critical_batch_interval": curve.critical_interval,
        "least_samples": curve.floor,
        "least_samples_interval": curve.floor_interval,
        "step_model": {
            "measured_step_s": found.measured_step_s,
            "measured_ranks": found.measured_ranks,
            "micro_batch": step.micro_batch,
            "micro_batch_s": step.micro_s,
            "parameters": found.parameters,
            "gradient_bytes": step.gradient_bytes,
            "hidden_part": step.hiding,
            "bandwidth": step.cluster.bandwidth,
            "latency_s": step.cluster.latency,
        },
        "choices": [asdict(c) for c in found.choices],
    }
    if target_s is not None:
        values["target_s"] = target_s
        values["chosen"] = asdict(chosen) if chosen else None
    return values


def run_tables(found: "RunAdvice", chosen: "Choice | None") -> list[Any]:
    from rich.table import Table

    from bigbatch.trainers.monitoring.progress import duration

    phases = Table(title=f"{found.name}: critical batch size", title_justify="left")
    for title in ("phase", "steps", "samples", "95 % interval"):
        phases.add_column(title, justify="left" if title == "phase" else "right")
    for p in found.phases:
        span = f"{p.first_step:,} to {p.last_step:,}"
        phases.add_row(p.name, span, _samples(p.critical), _interval(p.critical_interval))
    phases.add_section()
    curve = found.curve
    whole = _samples(curve.critical), _interval(curve.critical_interval)
    phases.add_row("the whole run", "", *whole)
    choices = Table(title="the fastest batch size on each number of GPUs", title_justify="left")
    for title in ("GPUs", "batch", "lr", "steps", "step", "time", "95 % interval", "extra samples"):
        choices.add_column(title, justify="right")
    for c in found.choices:
        low, high = (duration(s) for s in c.seconds_interval)
        choices.add_row(
            f"{c.gpus:,}",
            f"{c.batch:,}",
            f"{c.lr:.4g}",
            f"{c.steps:,}",
            f"{c.step_s * 1e3:,.1f} ms",
            duration(c.seconds),
            f"{low} to {high}",
            f"{c.extra_samples:.0%}" if math.isfinite(c.extra_samples) else "unbounded",
            style="bold green" if c is chosen else "",
        )
    return [phases, choices]


def run_notes(found: "RunAdvice", target_s: float | None, chosen: "Choice | None") -> list[str]:
    """What the tables rest on, and the answer to --target-time."""
    from bigbatch.trainers.monitoring.progress import duration

    step = found.step_time
    rule = {"linear": "lr grows with the batch", "sqrt": "lr grows with the batch's square root"}
    hidden = f", of which a backward pass hides up to {step.hiding * step.micro_s * 1e3:,.1f} ms"
    ranks = f"{found.measured_ranks} rank" + ("s" if found.measured_ranks > 1 else "")
    lines = [
        f"measured: batch {found.batch:,}, lr {found.lr:.4g}, {found.measured_step_s * 1e3:,.1f} "
        f"ms a step on {ranks}: {step.micro_s * 1e3:,.1f} ms a micro-batch of {step.micro_batch}",
        f"assumed: {found.rule} rule, {rule[found.rule]}; a ring all-reduce of "
        f"{step.gradient_bytes / 1e6:,.1f} MB at {step.cluster.bandwidth / 1e9:g} GB/s and "
        f"{step.cluster.latency * 1e6:g} us a hop{hidden if step.hiding else ''}",
    ]
    if target_s is not None and chosen is not None:
        unscaled = " optimizer.scale=null" if found.scaled else ""
        gpus = f"{chosen.gpus} GPU" + ("s" if chosen.gpus > 1 else "")
        lines.append(
            f"within {duration(target_s)}: {gpus}, global_batch={chosen.batch} "
            f"optimizer.lr={chosen.lr:.4g}{unscaled}, about {duration(chosen.seconds)}"
        )
    elif target_s is not None:
        shortest = found.choices[-1] if found.choices else None
        reach = f"; the shortest is {duration(shortest.seconds)}" if shortest else ""
        lines.append(f"within {duration(target_s)}: on no number of GPUs{reach}")
    return lines


def points_values(fit: "PointsAdvice") -> dict[str, Any]:
    """A fit of points in plain values; `error` is relative."""
    rows = zip(fit.batch, fit.cost, fit.fitted, fit.errors, fit.left_out_errors, strict=True)
    return {
        "unit": fit.unit,
        "critical_batch": fit.curve.critical,
        "critical_batch_interval": fit.curve.critical_interval,
        "least_cost": fit.curve.floor,
        "least_cost_interval": fit.curve.floor_interval,
        "points": [
            {
                "batch": float(batch),
                "measured": float(cost),
                "predicted": fit.curve.cost(float(batch)),
                "interval": fit.curve.cost_interval(float(batch)),
                "held_out": not fitted,
                "error": float(error),
                "error_without_it": float(left_out),
            }
            for batch, cost, fitted, error, left_out in rows
        ],
    }


def points_tables(fit: "PointsAdvice") -> list[Any]:
    from rich.table import Table

    from bigbatch.launcher.cli.render import two_columns

    low, high = fit.curve.floor_interval
    summary = two_columns(
        {
            "critical batch": f"{_samples(fit.curve.critical)}, 95 % interval "
            f"{_interval(fit.curve.critical_interval)}",
            "least cost": f"{fit.curve.floor:.4g} {fit.unit}, 95 % interval {low:.4g} to "
            f"{high:.4g}",
        }
    )
    table = Table()
    for title in ("batch", fit.unit, "predicted", "error", "fitted without it"):
        table.add_column(title, justify="right")
    rows = zip(fit.batch, fit.cost, fit.fitted, fit.errors, fit.left_out_errors, strict=True)
    for batch, cost, fitted, error, left_out in rows:
        alone = "held out" if not fitted else ("" if math.isnan(left_out) else f"{left_out:+.1%}")
        predicted = f"{fit.curve.cost(batch):.4g}"
        table.add_row(f"{batch:,.0f}", f"{cost:g}", predicted, f"{error:+.1%}", alone)
    return [summary, table]


def points_notes(fit: "PointsAdvice") -> list[str]:
    """What speaks against the fit, if anything does."""
    notes = []
    if not math.isfinite(fit.curve.critical):
        notes.append(
            "the cost does not rise with the batch: these points lie below the critical batch, or "
            "say nothing about it; measure larger batches"
        )
    worst = max(abs(float(e)) for e, fitted in zip(fit.errors, fit.fitted, strict=True) if fitted)
    if worst > _POOR:
        notes.append(
            f"the model misses a fitted point by {worst:.0%}: it does not describe these costs; "
            "check that they are epochs or samples to the same quality, each with a tuned rate"
        )
    return notes


def _samples(value: float) -> str:
    """A batch size in three digits, which is more than is ever known of it."""
    if not math.isfinite(value):
        return "no limit seen"
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 10 else f"{value:.2g}"


def _interval(bounds: tuple[float, float]) -> str:
    low, high = bounds
    if not math.isfinite(low):
        return "no limit seen"
    return (
        f"{_samples(low)} to {_samples(high)}" if math.isfinite(high) else f"over {_samples(low)}"
    )
