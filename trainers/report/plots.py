"""The report's plots, as SVG. Free of torch."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)
from numpy.typing import NDArray

from bigbatch.configs.judged import ACCURACY, Score, judged_in
from bigbatch.trainers.advice.critical_batch import Phase
from bigbatch.trainers.monitoring.history import PHASE_NAMES, Columns, History, loss_ceiling
from bigbatch.trainers.report.results import COMBINED, judge_of
from bigbatch.trainers.report.svg import BLUE, GREEN, INK, MUTED, ORANGE, figure, to_svg

_SHOWN_LAYERS = 60
_LAYERS = [(ORANGE, 0.95), (ORANGE, 0.5), (GREEN, 0.6), (BLUE, 0.75), (MUTED, 0.6), (BLUE, 0.3)]
_POINTS = 500  # more than a plot this wide can show


def curves(history: History) -> list[str]:
    """SVG of each learning curve that the run has figures for."""
    train = history.train
    plots: list[tuple[str, Callable[[Axes, History], None]]] = []
    if "loss" in train:
        plots.append(("loss", _loss))
    judges = {judge for columns in history.evals.values() if (judge := judged_in(columns))}
    if ACCURACY in judges:
        plots.append(("accuracy", _accuracy))
    plots += [(judge.key, partial(_error, judge=judge)) for judge in judges - {ACCURACY}]
    if "lr" in train:
        plots.append(("lr", _lr))
    if "grad_norm" in train:
        plots.append(("grad-norm", _grad_norm))
    if "images_per_s" in train:
        plots.append(("throughput", _throughput))
    if "data_s" in train and "step_s" in train:
        plots.append(("waiting", _waiting))
    found = []
    for name, draw in plots:
        with figure(4.6, 2.9) as (drawn, axes):
            draw(axes, history)
            _mark_snapshots(axes, history.snapshots)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
            found.append(to_svg(drawn, name, axes.get_title(loc="left")))
    return found


def _loss(axes: Axes, history: History) -> None:
    axes.set_title("Loss")
    _noisy(axes, history.train, "loss", BLUE, "train")
    for split, columns in history.evals.items():
        _evaluated(axes, columns, "nll", split)
    axes.set_ylim(0, loss_ceiling(history))
    axes.legend(loc="upper right")


def _accuracy(axes: Axes, history: History) -> None:
    evals = {split: c for split, c in history.evals.items() if "accuracy" in c}
    (only, *more) = evals
    axes.set_title("Accuracy" if more else f"Accuracy, {only}")
    for split, columns in evals.items():
        _evaluated(axes, columns, "accuracy", split)
        best = int(np.nanargmax(columns["accuracy"]))
        value = columns["accuracy"][best]
        axes.annotate(
            f"best {value:.2%}",
            (columns["step"][best], value),
            xytext=(0, 6),
            textcoords="offset points",
            ha="right" if columns["step"][best] > columns["step"][-1] / 2 else "left",
            color=ORANGE,
            fontsize=10.5,
        )
    # Early evaluations may be near chance: the interesting part is the upper one.
    lows = [np.nanpercentile(c["accuracy"], 20) for c in evals.values()]
    top = max(np.nanmax(c["accuracy"]) for c in evals.values())
    margin = max(0.02, (top - min(lows)) * 0.6)
    axes.set_ylim(max(0.0, min(lows) - margin), min(1.0, top) + margin * 0.35)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if more:
        axes.legend(loc="lower right")


def _error(axes: Axes, history: History, judge: Score) -> None:
    """A score of which less is better."""
    evals = {split: c for split, c in history.evals.items() if judge.key in c}
    axes.set_title(judge.heading if len(evals) > 1 else f"{judge.heading}, {next(iter(evals))}")
    for split, columns in evals.items():
        values = columns[judge.key]
        _evaluated(axes, columns, judge.key, split)
        if not np.isfinite(values).any():
            continue
        best = int(np.nanargmin(values))
        axes.annotate(
            f"best {judge.text(values[best])}",
            (columns["step"][best], values[best]),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right" if columns["step"][best] > columns["step"][-1] / 2 else "left",
            color=ORANGE,
            fontsize=10.5,
        )
    # Early evaluations may be far off: the interesting part is the lower one.
    highs = [np.nanpercentile(c[judge.key], 80) for c in evals.values()]
    if np.isfinite(highs).any() and np.nanmax(highs) > 0:
        axes.set_ylim(0, 1.3 * float(np.nanmax(highs)))
    if len(evals) > 1:
        axes.legend(loc="upper right")


def _lr(axes: Axes, history: History) -> None:
    axes.set_title("Learning rate")
    axes.plot(*_thin(history.train["step"], history.train["lr"]), color=BLUE)
    axes.set_ylim(bottom=0)


def _grad_norm(axes: Axes, history: History) -> None:
    axes.set_title("Gradient norm")
    _noisy(axes, history.train, "grad_norm", BLUE, None)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _throughput(axes: Axes, history: History) -> None:
    axes.set_title("Images per second")
    _noisy(axes, history.train, "images_per_s", BLUE, None)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))


def _waiting(axes: Axes, history: History) -> None:
    axes.set_title("Share of the step spent waiting for data")
    train = history.train
    share = train["data_s"] / np.maximum(train["step_s"], 1e-9)
    _noisy(axes, {"step": train["step"], "share": share}, "share", BLUE, None)
    axes.set_ylim(0, max(0.1, min(1.0, float(np.nanpercentile(share, 99)) * 1.2)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def phases(history: History) -> str:
    """SVG of the ranks' mean seconds of a step by phase, stacked; "" where none are recorded."""
    train = history.train
    names = [name for name in PHASE_NAMES if f"phases.{name}" in train]
    if not names:
        return ""
    with figure(6.4, 3.0) as (drawn, axes):
        axes.set_title("Time of a step, mean of the ranks")
        layers = [_centred_mean(train[f"phases.{n}"], len(train["step"]) // 80) for n in names]
        thin = slice(None, None, max(1, len(train["step"]) // _POINTS))
        stack = np.nan_to_num(np.array(layers))[:, thin] * 1000
        fills = zip(names, axes.stackplot(train["step"][thin], stack, linewidth=0), strict=True)
        for (name, area), (colour, alpha) in zip(fills, _LAYERS, strict=False):
            area.set_facecolor(colour)
            area.set_alpha(alpha)
            area.set_label(PHASE_NAMES[name])
        axes.set_ylim(0, float(np.percentile(stack.sum(0), 95)) * 1.25)
        axes.set_ylabel("ms")
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), reverse=True)
        return to_svg(drawn, "phases", "Time of a step by phase")


def noise(history: History, phases: Sequence[Phase]) -> str:
    """SVG of the noise scale over the steps and in each phase, with its interval; "" without."""
    train = history.train
    if "noise_scale" not in train or not np.isfinite(train["noise_scale"]).any():
        return ""
    with figure(7.2, 3.0) as (drawn, axes):
        axes.set_title("Gradient noise scale, in samples")
        axes.plot(*_thin(train["step"], train["noise_scale"]), color=BLUE, label="last 100 steps")
        for number, phase in enumerate(phases):
            if not 0 < phase.critical < np.inf:
                continue
            low, high = np.clip(phase.critical_interval, phase.critical / 100, phase.critical * 100)
            span = [phase.first_step, phase.last_step]
            label = None if number else f"{phase.name.split()[0]}, with 95 % interval"
            axes.fill_between(span, low, high, color=ORANGE, alpha=0.25, linewidth=0)
            axes.plot(span, [phase.critical] * 2, color=ORANGE, label=label)
        if isinstance(history.recipe.global_batch, int):
            axes.axhline(
                history.recipe.global_batch, color=MUTED, linestyle=":", label="global batch"
            )
        else:
            steps, batches = _thin(train["step"], history.batches)
            axes.plot(steps, batches, color=MUTED, linestyle=":", label="global batch")
        axes.set_yscale("log")
        # Powers of ten alone may all lie outside.
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(
            LogLocator(
                subs=(1, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5) if high < 200 * low else (1,)
            )
        )
        axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return to_svg(drawn, "noise-scale", "Gradient noise scale by phase")


def trust(ratios: Columns) -> str:
    """SVG of the trust ratio of each layer over the steps: dark is high, on a log scale."""
    names = [name for name in ratios if name != "step"]
    if not names:
        return ""
    picked = names[:: max(1, -(-len(names) // _SHOWN_LAYERS))]
    steps = ratios["step"]
    columns = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 60)).astype(int))
    values = np.array([ratios[name][columns] for name in picked])
    logs = np.log10(np.where(values > 0, values, np.nan))
    low, high = np.nanmin(logs), np.nanmax(logs)
    shade = (logs - low) / max(high - low, 1e-9)
    with figure(7.2, 1.0 + 0.2 * len(picked)) as (drawn, axes):
        axes.set_title(f"Trust ratios, {10**low:.2g} (faint) to {10**high:.2g} (solid)")
        for row, column in np.argwhere(np.isfinite(shade)).tolist():
            cell = Rectangle((column, row - 0.46), 1, 0.92, linewidth=0, facecolor=BLUE)
            cell.set_alpha(0.06 + 0.94 * float(shade[row, column]))
            axes.add_patch(cell)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(picked) - 0.5, -0.5)
        axes.set_yticks(range(len(picked)), [_tail(name) for name in picked], fontsize=8.5)
        ticks = np.unique(np.linspace(0, len(columns) - 1, min(6, len(columns))).astype(int))
        labels = [_thousands(float(steps[columns[tick]])) for tick in ticks]
        axes.set_xticks(ticks + 0.5, labels)
        axes.set_xlabel("step")
        axes.grid(visible=False)
        return to_svg(drawn, "trust", "Trust ratios by layer")


def members(rows: Sequence[tuple[str, Mapping[str, Mapping[str, Any]], bool]]) -> str:
    """SVG of the scores of members and of what is made of them, one row each, by split."""
    rows, judge = list(reversed(rows)), judge_of(rows)
    with figure(5.2, 0.9 + 0.36 * len(rows)) as (drawn, axes):
        axes.set_title(judge.heading)
        # A little apart, so that equal scores do not hide one another.
        for split, colour, marker, shift in (
            ("val", ORANGE, "D", 0.13),
            ("test", BLUE, "o", -0.13),
        ):
            for y, (name, figures, kept) in enumerate(rows):
                score = (figures.get(split) or {}).get(judge.key)
                if score is None:
                    continue
                axes.plot(
                    score,
                    y + shift,
                    marker,
                    color=colour,
                    markersize=9 if name in COMBINED else 6.5,
                    alpha=1.0 if kept else 0.35,
                    markeredgewidth=0,
                )
            if any(split in figures for _, figures, _ in rows):
                axes.plot([], [], marker, color=colour, markeredgewidth=0, label=split)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if judge.share:
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
        return to_svg(drawn, "members", f"{judge.heading} of members, ensemble and soup")


def confusion(
    classes: Sequence[str], matrix: NDArray[np.int64], images: NDArray[np.int64] | None = None
) -> str:
    """SVG of a confusion matrix, rows are true classes; counts are written up to 20 classes.

    `images` are those of each class, [C], where the matrix shows some of its answers alone.

    Right answers are blue and wrong ones orange, each darker with its share of the true
    class: an error of one per cent must not vanish beside a diagonal of ninety-nine.
    """
    count = len(classes)
    total = matrix.sum(axis=1) if images is None else images
    share = matrix / np.maximum(total, 1)[:, None]
    side = min(6.4, 2.2 + 0.36 * count)
    with figure(side, side) as (drawn, axes):
        axes.grid(visible=False)
        axes.set_aspect("equal")
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(count - 0.5, -0.5)
        for i, j in zip(*(n.tolist() for n in np.nonzero(matrix)), strict=True):
            alpha = 0.12 + 0.6 * share[i, j] if i == j else 0.15 + 0.85 * share[i, j] ** 0.5
            cell = Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, linewidth=0, alpha=alpha)
            cell.set_facecolor(BLUE if i == j else ORANGE)
            axes.add_patch(cell)
            if count <= 20:
                axes.text(j, i, f"{matrix[i, j]}", ha="center", va="center", fontsize=9.5)
        every = max(1, -(-count // 25))
        ticks = list(range(0, count, every))
        names = [_short(classes[i]) for i in ticks]
        long = max(map(len, names)) > 3
        axes.set_xticks(ticks, names, rotation=90 if long else 0, color=INK)
        axes.set_yticks(ticks, names, color=INK)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        for spine in axes.spines.values():
            spine.set_visible(False)
        return to_svg(drawn, "confusion", "Confusion matrix")


def _noisy(axes: Axes, columns: Columns, key: str, colour: str, label: str | None) -> None:
    """The values faintly, and their moving average over a 40th of them on top."""
    step, values = columns["step"], columns[key]
    axes.plot(*_thin(step, values), color=colour, alpha=0.28, linewidth=1)
    axes.plot(*_thin(step, _centred_mean(values, len(step) // 80)), color=colour, label=label)


def _centred_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Mean of the finite values at most `reach` places away: it does not lag as an EMA does."""
    reach = min(25, max(2, reach))
    finite = np.isfinite(values)
    sums, counts = (
        np.convolve(np.pad(x.astype(np.float64), reach), np.ones(2 * reach + 1), mode="valid")
        for x in (np.where(finite, values, 0.0), finite)
    )
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _evaluated(axes: Axes, columns: Columns, key: str, split: str) -> None:
    if key not in columns:
        return
    marker = "o" if len(columns["step"]) <= 60 else None
    colour = ORANGE if split == "val" else GREEN
    axes.plot(columns["step"], columns[key], color=colour, marker=marker, markersize=3, label=split)


def _mark_snapshots(axes: Axes, steps: Sequence[int]) -> None:
    for step in steps if len(steps) > 1 else ():
        axes.axvline(step, color=GREEN, linewidth=1.1, linestyle=(0, (2, 3)), zorder=0.5)


def _thin(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most about `_POINTS` points with the same extremes: each bucket's lowest and highest."""
    if len(x) <= _POINTS:
        return x, y
    picked = []
    for bucket in np.array_split(np.arange(len(x)), _POINTS // 2):
        finite = bucket[np.isfinite(y[bucket])]
        if len(finite):
            picked += sorted({finite[np.argmin(y[finite])], finite[np.argmax(y[finite])]})
    return x[picked], y[picked]


def _thousands(value: float, _: object = None) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def _tail(name: str) -> str:
    """The end of a parameter's name, which tells more than its beginning."""
    return name if len(name) <= 32 else "\u2026" + name[-31:]


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "\u2026"
