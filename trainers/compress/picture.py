"""Accuracy against size and time of every variant, with those that none beats in both. No torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from bigbatch.configs.plot_style import plot_style
from bigbatch.trainers.compress.table import shown_split

_COLOURS = {
    None: "0.2",
    "prune": "#4477aa",
    "structured": "#ee6677",
    "lowrank": "#228833",
    "int8": "#aa3377",
    "codebook": "#b8860b",
}  # after Tol's bright scheme, which colour-blind readers tell apart
# Where a label stands by its point, so that those of methods that meet do not.
_LABELS: dict[str, tuple[tuple[int, int], Literal["left", "right"]]] = {
    "lowrank": ((6, -10), "left"),
    "codebook": ((-6, 4), "right"),
}
_MARKERS = {"torch": "o", "onnxruntime": "D"}

Rows = Sequence[Mapping[str, Any]]


def pareto(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Places of the points that no other beats: none costs less and gains as much, or costs as
    much and gains more. From cheap to dear; of equal points the first."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i], i))
    best, front = float("-inf"), []
    for place in order:
        if gains[place] > best:
            best = gains[place]
            front.append(place)
    return front


@plot_style()
def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture as PNG."""
    rows: Rows = result["results"]
    role, machine = shown_split(result), result["machine"]
    figure = Figure(figsize=(13.2, 4.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    where = f"{machine['device']}, {machine['threads']} thread" + "s" * (machine["threads"] > 1)
    _panel(panels[0], rows, role, lambda row: row["gzip_bytes"] / 1e6)
    panels[0].set_xlabel("MB of the file, after gzip")
    for axes, batch in zip(panels[1:], ("1", "64"), strict=True):
        _panel(axes, rows, role, lambda row, batch=batch: row["latency_ms"][batch])  # type: ignore[misc]
        images = "image" if batch == "1" else "images"
        axes.set_xlabel(f"ms for {batch} {images} ({where})")
    panels[0].set_ylabel(f"accuracy on {role}, {result['splits'][role]['samples']:,} images")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1))
    methods = dict.fromkeys(row["method"] for row in rows)
    handles = [
        Line2D([], [], color=_COLOURS[m], marker="o", ls="", label=m or "float32") for m in methods
    ]
    if any(row["runtime"] == "onnxruntime" for row in rows):
        handles.append(Line2D([], [], color="0.5", marker="D", ls="", label="by onnxruntime"))
    handles.append(Line2D([], [], color="0.8", lw=4, label="beaten by none in both"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    length = result["settings"]["finetune"]
    title = f"{result['member']}: what compression costs" + (
        f", fine-tuned {length}" * bool(length)
    )
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, format="png")


def _panel(axes: Axes, rows: Rows, role: str, cost: Callable[[Mapping[str, Any]], float]) -> None:
    costs = [float(cost(row)) for row in rows]
    gains = [float(row["splits"][role]["accuracy"]) for row in rows]
    front = pareto(costs, gains)
    ends = [costs[i] for i in front], [gains[i] for i in front]
    axes.step(*ends, where="post", color="0.8", lw=4, zorder=1, solid_capstyle="round")
    for method in dict.fromkeys(row["method"] for row in rows if row["method"]):
        own = [i for i, row in enumerate(rows) if row["method"] == method]
        axes.plot(
            [costs[i] for i in own], [gains[i] for i in own], color=_COLOURS[method], lw=0.8, ls=":"
        )
    for x, y, row in zip(costs, gains, rows, strict=True):
        low, high = row["splits"][role]["interval"]
        axes.errorbar(
            x,
            y,
            yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
            fmt=_MARKERS[row["runtime"]],
            color=_COLOURS[row["method"]],
            elinewidth=0.8,
            markersize=6,
        )
        place, side = _LABELS.get(row["method"], ((6, 4), "left"))
        axes.annotate(
            _setting(row),
            (x, y),
            place,
            textcoords="offset points",
            ha=side,
            fontsize=8,
            color=_COLOURS[row["method"]],
        )
    times = max(costs) / min(costs)
    if times > 4:  # of a narrower range, a logarithmic axis would have one number
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if times > 20 else (1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _setting(row: Mapping[str, Any]) -> str:
    """How far a method went; its colour says which one."""
    if row.get("bits"):
        return f"{row['bits']} bit"
    setting = row.get("share") or row.get("energy")
    return "" if setting is None else f"{setting:g}"
