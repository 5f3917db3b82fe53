"""The scores of a finished run, as rows and as the table that ends it.

Apart from the report, for the table does not wait for matplotlib. Free of torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from bigbatch.configs.judged import ACCURACY, SCORES, Score, judged_in, shown

COMBINED = ("ensemble", "soup", "ema", "swa", "swap")  # what summary.json has beside the members
Row = tuple[str, dict[str, Mapping[str, Any]], bool]  # name, figures by split, kept as a member


def final_table(summary: Mapping[str, Any]) -> Table:
    """Scores of each member, ensemble, soup and average, on val and test.

    `summary` is the content of summary.json. Members beyond the selection margin are dimmed
    and marked.
    """
    splits = [split for split in ("val", "test") if split in summary]
    rows = result_rows(summary)
    measures = shown(judge_of(rows))
    table = Table(box=box.SIMPLE_HEAD)  # fits 80 columns
    table.add_column("\nmodel", no_wrap=True)
    for split in splits:
        for measure in measures:
            table.add_column(f"{split}\n{measure.title}", justify="right", no_wrap=True)
    for name, figures, kept in rows:
        cells = [figure(figures.get(split), each.key) for split in splits for each in measures]
        style = "bold" if name in COMBINED else ("" if kept else "dim")
        table.add_row(name if kept else f"{name} (out)", *cells, style=style)
    return table


def judge_of(rows: Sequence[tuple[str, Mapping[str, Mapping[str, Any]], bool]]) -> Score:
    """The score that models of these rows are judged by."""
    entries = [entry for _, figures, _ in rows for entry in figures.values()]
    return next(filter(None, map(judged_in, entries)), ACCURACY)


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
    """One figure as text: a share in per cent, the others with four decimals or digits."""
    value = entry.get(measure) if entry else None
    if value is None:
        return "-"
    return SCORES[measure].text(value) if measure in SCORES else f"{value:.4f}"
