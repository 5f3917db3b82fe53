"""What was left out of shards: counted by reason and extension, and read back from a file."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bigbatch.data.journal import kind


def count_skips(skipped: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows {reason, extension, count, first}, the most frequent first.

    Reasons that differ in numbers and names alone count as one; a row's `reason` and `first`
    are those of its first entry.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for what, why in skipped:
        extension = os.path.splitext(what)[1].lower()
        if " " in extension or "/" in extension:  # of a place in an archive, not of a file
            extension = ""
        row = rows.setdefault(
            (kind(why), extension),
            {"reason": why, "extension": extension, "count": 0, "first": what},
        )
        row["count"] += 1
    return sorted(rows.values(), key=lambda row: -row["count"])


def describe(row: dict[str, Any]) -> str:
    """A row of `count_skips` as one line."""
    if row["count"] == 1:
        return f"{row['first']}: {row['reason']}"
    files = f" ({row['extension']})" if row["extension"] else ""
    return f"{row['count']:,}{files}: {row['reason']}; first {row['first']}"


def read_skips(path: Path) -> list[tuple[str, str]]:
    """The entries of a skipped.txt; none where there is no such file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [(what, why) for what, _, why in (line.partition("\t") for line in lines)]
