"""What `bigbatch advise` found, in plain values, tables and sentences."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports numpy
    from bigbatch.trainers.advice.advise import Choice, RunAdvice
    from bigbatch.trainers.advice.points import PointsAdvice
    from bigbatch.trainers.advice.schedule import ScheduleAdvice

_POOR = 0.25  # relative error of a fitted point from which the model is called wrong


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


def schedule_values(plan: "ScheduleAdvice") -> dict[str, Any]:
    """A proposed schedule in plain values. Batches in samples, times in seconds."""
    from dataclasses import asdict

    return {
        "gpus": plan.gpus,
        "stages": [asdict(s) | {"steps": s.steps, "seconds": s.seconds} for s in plan.stages],
        "steps": plan.steps,
        "samples": plan.samples,
        "seconds": plan.seconds,
        "constant": asdict(plan.constant),
        "optimizer": plan.optimizer,
        "reason": plan.reason,
        "lr": plan.lr,
        "lr_rule": plan.rule,
    }


def schedule_table(plan: "ScheduleAdvice") -> Any:
    from rich.table import Table

    from bigbatch.trainers.monitoring.progress import duration

    gpus = "1 GPU" if plan.gpus == 1 else f"{plan.gpus:,} GPUs"
    table = Table(title=f"a batch schedule for {gpus}", title_justify="left")
    for title in ("in place of", "batch", "samples", "steps", "step", "time"):
        table.add_column(title, justify="left" if title == "in place of" else "right")
    for s in plan.stages:
        table.add_row(
            ", ".join(s.phases),
            f"{s.batch:,}",
            f"{s.samples:,}",
            f"{s.steps:,}",
            f"{s.step_s * 1e3:,.1f} ms",
            duration(s.seconds),
        )
    return table


def schedule_notes(plan: "ScheduleAdvice") -> list[str]:
    """What the schedule comes to, beside the best batch that does not change."""
    from bigbatch.trainers.monitoring.progress import duration

    lines = [
        f"predicted: {plan.steps:,} steps, {plan.samples:,} samples, {duration(plan.seconds)}",
    ]
    if len(plan.stages) == 1:
        lines[0] += "; the same batch is fastest throughout, so that nothing is gained by a change"
    else:
        other = plan.constant
        lines[0] += (
            f"; with {other.batch:,} throughout {other.steps:,} steps, {duration(other.seconds)}"
        )
    lines.append(
        f"optimizer: {plan.optimizer}, lr {plan.lr:g} at {plan.stages[0].batch:,}, rule "
        f"{plan.rule}: {plan.reason}. Tune the rate from there"
    )
    return lines
