"""Pictures of an evaluated split as SVG, from the dictionary of its statistics. Free of torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bigbatch.trainers.evaluation.accuracy import wilson
from bigbatch.trainers.report.svg import BLUE, INK, MUTED, ORANGE, figure, to_svg

_WRITTEN = 12  # members up to which figures stand in the cells


def pictures(statistics: Mapping[str, Any], prefix: str = "") -> list[str]:
    """SVG of each picture that `Statistics.summary` has figures for.

    `prefix` tells their ids from those of another split on the same page.
    """
    drawn = [reliability, risk_coverage]
    if len((statistics["members"] or {}).get("each", [])) > 1:
        drawn += [by_number, disagreement]
    return [draw(statistics, prefix) for draw in drawn]


def reliability(statistics: Mapping[str, Any], prefix: str = "") -> str:
    """SVG of accuracy over confidence by bin, with intervals; also as it was before temperature."""
    with figure(4.6, 4.7) as (drawn, axes):
        axes.set_title(f"Accuracy by confidence, ECE {statistics['ece']:.3f}")
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1.2)
        before = statistics["before_temperature"]
        if before:
            _bins(axes, before["reliability"], ORANGE, f"before: ECE {before['ece']:.3f}")
        label = f"at temperature {statistics['temperature'] or 1:.3g}"
        _bins(axes, statistics["reliability"], BLUE, label)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_aspect("equal")
        axes.set_xlabel("confidence; area of a dot: share of images")
        _in_percent(axes.xaxis, axes.yaxis)
        if before:
            drawn.legend(loc="outside lower center", ncols=2, handletextpad=0.1)
        return to_svg(drawn, f"{prefix}reliability", "Reliability diagram")


def _bins(axes: Axes, table: Mapping[str, Any], colour: str, label: str) -> None:
    """A dot for each bin, its area the share of samples, and the interval of its accuracy."""
    total = sum(table["count"])
    columns = zip(table["count"], table["confidence"], table["accuracy"], strict=True)
    filled = [row for row in columns if row[0]]
    for count, confidence, accuracy in filled:
        interval = wilson(round(accuracy * count), count)
        axes.plot([confidence] * 2, interval, color=colour, linewidth=1.1, alpha=0.5)
    axes.plot(*zip(*[row[1:] for row in filled], strict=True), color=colour, linewidth=1, alpha=0.5)
    for count, confidence, accuracy in filled:
        size = 3 + 13 * (count / total) ** 0.5
        (dot,) = axes.plot(confidence, accuracy, "o", color=colour, markersize=size)
        dot.set(markeredgewidth=0, clip_on=False)
    axes.plot([], [], "o", color=colour, markersize=6, markeredgewidth=0, label=label)


def risk_coverage(statistics: Mapping[str, Any], prefix: str = "") -> str:
    """SVG of the share of wrong answers over the share of images that are answered."""
    table = statistics["risk_coverage"]
    coverage, risk = np.array(table["coverage"]), np.array(table["risk"])
    with figure(4.6, 3.4) as (drawn, axes):
        axes.set_title(f"Wrong answers by coverage, AURC {table['aurc']:.3g}")
        axes.fill_between(coverage, 0, risk, color=BLUE, alpha=0.12, linewidth=0)
        axes.plot(coverage, risk, color=BLUE)
        said = []
        for point in table["accuracy_at"]:
            (dot,) = axes.plot(point["coverage"], 1 - point["accuracy"], "o", color=ORANGE)
            dot.set(markersize=5, markeredgewidth=0, clip_on=False)
            said.append(f"{point['coverage']:.0%} answered: {point['accuracy']:.2%} right")
        axes.text(0.03, 0.97, "\n".join(said), transform=axes.transAxes, va="top", color=ORANGE)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, max(0.01, float(risk.max()) * 1.1))
        axes.set_xlabel("share of images answered, the most confident first")
        _in_percent(axes.xaxis, axes.yaxis)
        return to_svg(drawn, f"{prefix}risk-coverage", "Risk over coverage")


def by_number(statistics: Mapping[str, Any], prefix: str = "") -> str:
    """SVG of the accuracy of 1, 2, ... members' mean probability: mean and range of the subsets."""
    rows = statistics["members"]["by_number"]
    numbers = [row["members"] for row in rows]
    low, high = zip(*(row["accuracy_range"] for row in rows), strict=True)
    with figure(4.6, 4.1) as (drawn, axes):
        axes.set_title("Accuracy by number of members")
        axes.fill_between(numbers, low, high, color=BLUE, alpha=0.16, linewidth=0)
        axes.plot([], [], color=BLUE, alpha=0.16, linewidth=8, label="lowest and highest subset")
        means = [row["accuracy"] for row in rows]
        axes.plot(numbers, means, "o-", color=BLUE, markersize=5, label="mean over subsets")
        axes.axhline(
            high[0], color=MUTED, linestyle=":", linewidth=1.2, label=f"best member, {high[0]:.2%}"
        )
        axes.annotate(
            f"{means[-1]:.2%}",
            (numbers[-1], means[-1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color=BLUE,
        )
        axes.set_xlim(0.6, len(rows) + 0.4)
        axes.margins(y=0.16)
        axes.set_xlabel("members")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _in_percent(axes.yaxis)
        drawn.legend(loc="outside lower center")
        return to_svg(drawn, f"{prefix}by-number", "Accuracy by number of members")


def disagreement(statistics: Mapping[str, Any], prefix: str = "") -> str:
    """SVG of the share of images on which two members disagree; the diagonal is their error."""
    members = statistics["members"]
    names = [str(row["name"]) for row in members["each"]]
    shares = np.array(members["disagreement"])
    count = len(names)
    high = max(float(shares.max()), 1e-9)
    side = min(6.4, 2.9 + 0.45 * count)
    with figure(side + 0.6, side) as (drawn, axes):
        axes.set_title("Disagreement of members")
        axes.grid(visible=False)
        axes.set_aspect("equal")
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(count - 0.5, -0.5)
        for i, j in np.ndindex(count, count):
            own = i == j
            value = 1 - members["each"][i]["accuracy"] if own else float(shares[i, j])
            cell = Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, linewidth=0)
            cell.set_facecolor(ORANGE if own else BLUE)
            cell.set_alpha(0.25 if own else 0.06 + 0.6 * value / high)
            axes.add_patch(cell)
            if count <= _WRITTEN:
                axes.text(j, i, f"{value:.1%}", ha="center", va="center", fontsize=9.5)
        every = range(0, count, max(1, -(-count // 25)))
        shown = [names[i] if len(names[i]) <= 16 else "\u2026" + names[i][-15:] for i in every]
        axes.set_xticks(list(every), shown, rotation=90, color=INK)
        axes.set_yticks(list(every), shown, color=INK)
        axes.set_xlabel("diagonal: own wrong answers")
        for spine in axes.spines.values():
            spine.set_visible(False)
        return to_svg(drawn, f"{prefix}disagreement", "Disagreement of members")


def _in_percent(*sides: Axis) -> None:
    for side in sides:
        side.set_major_formatter(PercentFormatter(1.0, decimals=None))  # each its own digits
