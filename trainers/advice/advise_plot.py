"""Pictures of advice: cost over batch size, time over GPUs. Free of torch."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bigbatch.configs.plot_style import MUTED, plot_style
from bigbatch.trainers.advice.advise import RunAdvice
from bigbatch.trainers.advice.critical_batch import CostCurve
from bigbatch.trainers.advice.points import PointsAdvice
from bigbatch.trainers.monitoring.progress import duration


@plot_style()
def draw_points(fit: PointsAdvice, path: Path) -> None:
    """Points, the curve with its interval, and the critical batch size."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    _cost(axes, fit.curve, fit.batch.min(), fit.batch.max(), 1.0)
    fitted = np.array(fit.fitted)
    axes.plot(fit.batch[fitted], fit.cost[fitted], "o", color="C0", label="fitted")
    if not fitted.all():
        axes.plot(fit.batch[~fitted], fit.cost[~fitted], "o", mfc="white", label="held out")
    axes.set(xlabel="batch size", ylabel=fit.unit)
    axes.legend()
    figure.savefig(path)


@plot_style()
def draw_run(found: RunAdvice, path: Path) -> None:
    """Samples over batch size beside time over GPUs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    batches = [found.batch, *(c.batch for c in found.choices)]
    _cost(left, found.curve, min(batches), max(batches), found.curve.cost(found.batch))
    left.plot(found.batch, 1.0, "o", color="C0", label="this run")
    left.set(xlabel="batch size", ylabel="samples, relative to this run")
    left.legend()
    gpus = [c.gpus for c in found.choices]
    low, high = zip(*(c.seconds_interval for c in found.choices), strict=True)
    right.fill_between(gpus, low, high, alpha=0.2, linewidth=0)
    seconds = [c.seconds for c in found.choices]
    right.plot(gpus, seconds, "o-")
    for c in found.choices:
        right.annotate(f"{c.batch:,}", (c.gpus, c.seconds), (4, 4), textcoords="offset points")
    right.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="time, at the batch size shown")
    right.set_xticks(gpus, [f"{g:,}" for g in gpus])
    right.set_yticks(seconds, [duration(s) for s in seconds])
    right.minorticks_off()
    figure.savefig(path)


def _cost(axes: Axes, curve: CostCurve, smallest: float, largest: float, unit: float) -> None:
    batches = np.geomspace(smallest / 2, largest * 2, 200)
    low, high = np.array([curve.cost_interval(b) for b in batches]).T
    axes.fill_between(batches, low / unit, high / unit, alpha=0.2, linewidth=0)
    axes.plot(batches, curve.cost(batches) / unit, color="C0", label="floor (1 + B / critical)")
    if smallest / 2 < curve.critical < largest * 2:
        axes.axvline(curve.critical, color=MUTED, linestyle=":")
        axes.text(curve.critical, 0.02, " critical", transform=axes.get_xaxis_transform())
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
