"""The learning-rate range test (Smith 2017, arXiv:1506.01186): what the losses of a sweep say.

Free of torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.configs.errors import UserError
from bigbatch.configs.plot_style import BLUE, GREEN, MUTED, ORANGE, plot_style
from bigbatch.configs.words import plural
from bigbatch.trainers.monitoring.history import smooth

Array = NDArray[np.float64]

_DIVERGED = 4.0  # times the lowest smoothed loss, as in fastai
_LEAST = 10  # steps below which nothing can be said


@dataclass(frozen=True)
class RangeTest:
    """A sweep up to where the loss diverged, and two readings of it."""

    lr: Array  # [n], rising
    loss: Array  # [n]
    smoothed: Array  # [n]
    diverged: bool
    steepest: float  # where the loss falls fastest over log(lr)
    tenth: float  # a tenth of the rate with the lowest loss


def divergence(loss: Sequence[float]) -> int | None:
    """The index at which a sweep has diverged; None where it has not.

    That is the first loss that is not finite, or the first smoothed one above four times the
    lowest before it.
    """
    lowest = math.inf
    for i, (value, mean) in enumerate(zip(loss, smooth(np.array(loss)).tolist(), strict=True)):
        if not math.isfinite(value) or mean > _DIVERGED * lowest:
            return i
        lowest = min(lowest, mean)
    return None


def analyse(lr: Sequence[float], loss: Sequence[float]) -> RangeTest:
    """Read a sweep. Raises UserError where the loss did not fall, or diverged at once."""
    end = divergence(loss)
    rates, values = np.array(lr[:end]), np.array(loss[:end])
    if len(values) < _LEAST:
        raise UserError(
            f"the loss diverged after {len(values)} steps, too few to read anything from; start "
            "from a smaller rate with --from, or take more --steps"
        )
    # From both sides: a mean over the past alone would place everything at higher rates.
    path = (smooth(values) + smooth(values[::-1])[::-1]) / 2
    bottom = int(path.argmin())
    if bottom < 2:
        raise UserError(
            f"the loss did not fall anywhere between {rates[0]:.3g} and {rates[-1]:.3g}; start "
            "from a smaller rate with --from"
        )
    fall = path[0] - path[bottom]
    noise = (values - path)[: bottom + 1].std()
    if fall < noise:
        raise UserError(
            f"the loss fell by {fall:.2g} between {rates[0]:.3g} and {rates[-1]:.3g}, less than it "
            f"varies from step to step ({noise:.2g}); go to higher rates with --to, or take more "
            "--steps"
        )
    slope = np.gradient(path, np.log(rates))
    return RangeTest(
        lr=rates,
        loss=values,
        smoothed=path,
        diverged=end is not None,
        steepest=float(rates[slope[: bottom + 1].argmin()]),
        tenth=float(rates[bottom] / 10),
    )


@plot_style()
def draw(test: RangeTest, name: str, path: Path) -> None:
    """Losses over the rate, with the two readings (.png, .svg, .pdf)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    # The leap at the end is as high as it happens to be: what is beyond stands at the edge.
    low, fallen = float(test.loss.min()), test.loss[: int(test.smoothed.argmin()) + 1]
    high = min(float(test.loss.max()), low + 3 * max(float(fallen.max()) - low, 1e-12))
    raw: Any = {"color": MUTED, "alpha": 0.5, "linestyle": "", "markeredgewidth": 0}
    inside = test.loss <= high
    axes.plot(test.lr[inside], test.loss[inside], marker=".", markersize=6, label="steps", **raw)
    if not inside.all():
        edge, beyond = np.full(int((~inside).sum()), high), plural(int((~inside).sum()), "step")
        above = f"{beyond} above, up to {test.loss.max():.3g}"
        axes.plot(test.lr[~inside], edge, marker="^", markersize=6, label=above, **raw)
    axes.plot(test.lr, test.smoothed, color=BLUE)
    readings = (("steepest descent", test.steepest), ("minimum / 10", test.tenth))
    for colour, (label, rate) in zip((ORANGE, GREEN), readings, strict=True):
        axes.axvline(rate, color=colour, linestyle=":", label=f"{label}: {rate:.3g}")
    room = 0.06 * max(high - low, 1e-12)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title=name)
    axes.set_ylim(low - room, high + room)
    axes.legend()
    figure.savefig(path)
