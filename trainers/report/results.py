"""The scores of a finished run, as rows and as the table that ends it.

Apart from the report, for the table does not wait for matplotlib. Free of torch.
"""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

MEASURES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
COMBINED = ("ensemble", "soup", "ema", "swa")  # what summary.json has beside the members
Row = tuple[str, dict[str, Mapping[str, Any]], bool]  # name, figures by split, kept as a member


def final_table(summary: Mapping[str, Any]) -> Table:
    """Accuracy, NLL and ECE of each member, ensemble, soup and average, on val and test.

    `summary` is the content of summary.json. Members beyond the selection margin are dimmed
    and marked.
    """
    splits = [split for split in ("val", "test") if split in summary]
    table = Table(box=box.SIMPLE_HEAD)  # fits 80 columns
    table.add_column("\nmodel", no_wrap=True)
    for split in splits:
        for measure in MEASURES.values():
            table.add_column(f"{split}\n{measure}", justify="right", no_wrap=True)
    for name, figures, kept in result_rows(summary):
        cells = [figure(figures.get(split), key) for split in splits for key in MEASURES]
        style = "bold" if name in COMBINED else ("" if kept else "dim")
        table.add_row(name if kept else f"{name} (out)", *cells, style=style)
    return table


def result_rows(summary: Mapping[str, Any]) -> list[Row]:
    """summary.json by row: each member, then ensemble, soup and average."""
    rows: dict[str, Row] = {}
    for split in ("val", "test"):
        figures = summary.get(split) or {}
        entries = [(str(m["name"]), m) for m in figures.get("members") or []]
        entries += [(name, figures[name]) for name in COMBINED if figures.get(name)]
        for name, entry in entries:
            row = rows.setdefault(name, (name, {}, bool(entry.get("kept", True))))
            row[1][split] = entry
    members = [row for row in rows if row not in COMBINED]
    if len(members) == 1 and rows.get("ensemble", ("", {}, True))[1] == _scores(rows[members[0]]):
        del rows["ensemble"]  # of one member: it would say the same again
    return list(rows.values())


def _scores(row: Row) -> dict[str, Mapping[str, Any]]:
    """A member's figures as an ensemble has them."""
    own = ("name", "kept")
    return {
        split: {key: value for key, value in entry.items() if key not in own}
        for split, entry in row[1].items()
    }


def figure(entry: Mapping[str, Any] | None, measure: str) -> str:
    """One figure as text: accuracy in per cent, the others with four decimals."""
    value = entry.get(measure) if entry else None
    if value is None:
        return "-"
    return f"{value:.2%}" if measure == "accuracy" else f"{value:.4f}"
