"""What compression costs and gives, as a table for the terminal."""

from collections.abc import Mapping
from typing import Any


def shown_split(result: Mapping[str, Any]) -> str:
    """The split by which variants are compared: test, where there is one."""
    return "test" if "test" in result["splits"] else "val"


def table_of(result: Mapping[str, Any]) -> Any:
    """A row for each variant. The JSON has the rest: parameters, FLOPs, other scores and splits."""
    from rich import box
    from rich.table import Table

    role, machine, length = shown_split(result), result["machine"], result["settings"]["finetune"]
    tuned = f", fine-tuned {length}" if length else ""
    samples = result["splits"][role]["samples"]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{result['member']}{tuned}: accuracy on {samples:,} images of {role}",
        caption=f"ms: medians in turns, {machine['device']}, threads {machine['threads']}",
        title_justify="left",
        caption_justify="left",
        padding=0,
        pad_edge=False,
    )
    table.add_column("network", no_wrap=True)
    for name in ("MB", "gzip", "ms, 1", "ms, 64", "accuracy, 95 %", "change"):
        table.add_column(f"  {name}", justify="right", no_wrap=True)
    for row in result["results"]:
        scores = row["splits"][role]
        low, high = scores["interval"]
        table.add_row(
            row["name"],
            f"{row['bytes'] / 1e6:.3g}",
            f"{row['gzip_bytes'] / 1e6:.3g}",
            f"{row['latency_ms']['1']:.3g}",
            f"{row['latency_ms']['64']:.3g}",
            f"{scores['accuracy']:.2%} ({100 * low:.1f}-{100 * high:.1f})",
            "" if row["method"] is None else f"{100 * scores['change']:+.2f}",
        )
    return table
