"""Results as tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bigbatch.launcher.registry import RunInfo
from bigbatch.trainers.progress import duration

if TYPE_CHECKING:  # it imports numpy, psutil and safetensors
    from bigbatch.launcher.prove import Result

_COLOURS = {
    "running": "green",
    "finished": "bold green",
    "failed": "red",
    "killed": "red",
    "unreadable": "red",
    "stopped": "yellow",
}


_SHOWN_CLASSES = 40


def show(*tables: Table) -> None:
    """Print tables; in a pipe as wide as they are, so that no cell is cut."""
    console = Console()
    if not console.is_terminal:
        console.width = 200
    for table in tables:
        console.print(table)


def proof_table(results: "Sequence[Result]", name: str, steps: int) -> Table:
    table = Table(title=f"{name}: the first {steps} steps", title_justify="left")
    for title in ("run", "compared with", "samples", "weights differ by", ""):
        table.add_column(title)
    for r in results:
        run = f"{r.ranks} rank" + ("s" if r.ranks > 1 else "")
        if r.killed_at is not None:
            run += f", killed after step {r.killed_at}, resumed from step {r.resumed_from}"
        samples = f"same in {r.batches} micro-batches" if r.same_samples else "DIFFERENT"
        difference = "nothing, bit for bit" if r.difference == 0 else f"{r.difference:.1e}"
        limit = f" (limit {r.limit:.0e})" if r.difference else ""
        verdict = Text("passed", "green") if r.passed else Text("FAILED", "bold red")
        table.add_row(run, r.compared_with, samples, difference + limit, verdict)
    return table


def runs_table(runs: Sequence[RunInfo]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "best val", "last record"):
        table.add_column(title, no_wrap=True)
    for info in runs:
        steps = f"{info.step}/{info.total_steps}" if info.total_steps else str(info.step)
        best = "" if info.best_accuracy is None else f"{info.best_accuracy:.2%}"
        age = f"{duration(info.age_s)} ago"
        table.add_row(info.name, _state(info.state), steps, best, age)
    return table


def status_table(values: Mapping[str, Any]) -> Table:
    rows: dict[str, Any] = {
        "run": values["path"],
        "state": _state(values["state"]),
        "step": f"{values['step']} of {values['total_steps'] or 'unknown'}",
        "time left": _maybe(values["seconds_left"], duration),
        "processes": _maybe(values["world_size"], str),
        "device": values["device"],
        "starts": str(values["starts"]),
        "loss": _maybe(values["loss"], "{:.4f}".format),
        "learning rate": _maybe(values["lr"], "{:.4g}".format),
        "images/s": _maybe(values["images_per_s"], "{:,.0f}".format),
        "best val": _maybe(values["best_accuracy"], "{:.2%}".format),
        "checkpoints": ", ".join(values["checkpoints"]) or None,
        "last record": f"{duration(values['age_s'])} ago",
        "report": values["report"],
    }
    return two_columns(rows)


def inspect_tables(found: Mapping[str, Any]) -> list[Table]:
    """One table of the splits, one of their labels, and copies where there are any."""
    splits = Table(title=found["root"], title_justify="left")
    for title in ("split", "samples", "shards", "size", "bytes an image", "resolution", "formats"):
        splits.add_column(title)
    labels = Table(title="samples of each class", title_justify="left")
    labels.add_column("class")
    for name, split in found["splits"].items():
        labels.add_column(name, justify="right")
        common = [f"{r['width']}x{r['height']}: {r['images']}" for r in split["resolutions"][:3]]
        splits.add_row(
            name,
            f"{split['samples']:,}",
            f"{split['shards']:,}",
            f"{split['bytes'] / 1e6:,.1f} MB",
            _span(split["image_bytes"]),
            ", ".join(common),
            ", ".join(f"{form} {count}" for form, count in split["formats"].items()),
        )
    classes = list(dict.fromkeys(c for s in found["splits"].values() for c in s["labels"]))
    for label in classes[:_SHOWN_CLASSES]:
        counts = [s["labels"].get(label, 0) for s in found["splits"].values()]
        labels.add_row(label, *(f"{count:,}" for count in counts))
    if len(classes) > _SHOWN_CLASSES:
        labels.caption = f"and {len(classes) - _SHOWN_CLASSES:,} more classes; --json shows all"
    tables = [splits, labels]
    if found["duplicates"]:
        copies = {place: f"{count:,} images" for place, count in found["duplicates"].items()}
        tables.append(two_columns({"the same bytes more than once": "", **copies}))
    return tables


def _span(values: Mapping[str, float]) -> str:
    return f"{values['min']:,.0f} to {values['max']:,.0f}" if values else ""


def two_columns(rows: Mapping[str, Any]) -> Table:
    """Names and values; rows without a value are left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, value)
    return table


def _state(state: str) -> Text:
    return Text(state, _COLOURS.get(state, ""))


def _maybe(value: Any, form: Any) -> str | None:
    return None if value is None else str(form(value))
