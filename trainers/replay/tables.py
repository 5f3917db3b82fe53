"""A replayed step on the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from bigbatch.configs.terminal import Terminal
from bigbatch.trainers.replay.summary import Result
from bigbatch.trainers.report.pages import cell

_MOST = 8  # rows of a table; replay.json has all


def say_lines(lines: Sequence[str]) -> None:
    console = Terminal(soft_wrap=True, highlight=False)
    for line in lines:
        console.print(line)


def say(result: Result, lines: Sequence[str]) -> None:
    """The findings in words, then the foremost layers and samples."""
    console = Terminal(soft_wrap=True, highlight=False)
    if not console.is_terminal:  # no cell is cut
        console.width = 200
    for line in lines:
        console.print(line)
    layers = sorted(result["layers"], key=lambda row: -row["gradient_norm"])
    columns: tuple[str, ...] = (
        "layer",
        "gradient_norm",
        "share",
        "usual",
        "update_norm",
        "weight_norm",
    )
    console.print(_table(columns, layers))
    own = [s for s in result["samples"] if s["micro"] == result["micro"]]
    known = all(s["share"] is not None for s in own)
    by = "share" if known else "loss"
    own.sort(key=lambda s: -(s[by] or 0.0))
    columns = ("key", "class", "micro", "loss", "norm", "share", "layer")
    console.print(_table(columns, own))
    if not known:
        console.print(result["terms"])
    wrong = [a for a in result["activations"] if _is_odd(a)]
    if wrong:
        console.print(_table(("layer", "kind", "dead", "saturated", "non_finite"), wrong))
    elif result["activations"]:
        console.print("activations: none is dead by half, saturated by half or not finite")


def _is_odd(activation: dict[str, Any]) -> bool:
    half = max(activation["dead"] or 0.0, activation["saturated"] or 0.0) >= 0.5
    return half or activation["non_finite"] > 0


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="left" if name == columns[0] else "right")
    for row in rows[:_MOST]:
        table.add_row(*(cell(row[name]) for name in columns))
    if rows[_MOST:]:
        table.caption = f"and {len(rows) - _MOST} more"
    return table
