"""Pages that commands write into folders: a title, sentences, tables, pictures. Free of torch."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:2px 10px;text-align:right}"
    "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f4f4}"
    "img{max-width:100%}code{background:#f4f4f4}"
)


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of parts that are HTML already."""
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n{''.join(parts)}</html>\n"
    )


def sentences(lines: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)


def picture(title: str, file: str) -> str:
    """A picture that lies beside the page."""
    return f'<h2>{html.escape(title)}</h2>\n<img src="{html.escape(file)}">\n'


def table(first: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in (first, *columns))
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell(row[c]))}</td>" for c in (first, *columns))
        + "</tr>\n"
        for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>\n"


def cell(value: Any) -> str:
    """A value of a table; "-" where there is none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
