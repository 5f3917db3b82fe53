"""Results as tables on the terminal."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from bigbatch.configs.judged import ACCURACY, judged_in
from bigbatch.configs.terminal import Terminal
from bigbatch.configs.words import plural
from bigbatch.launcher.runs.registry import RunInfo
from bigbatch.trainers.monitoring.progress import duration

if TYPE_CHECKING:  # it imports numpy, psutil and safetensors
    from bigbatch.launcher.prove import Result

_COLOURS = {
    "running": "green",
    "queued": "cyan",
    "finished": "bold green",
    "failed": "red",
    "killed": "red",
    "unreadable": "red",
    "stopped": "yellow",
}


_SHOWN_CLASSES = 40
_SHOWN_SAMPLES = 100


def show(*tables: Table) -> None:
    """Print tables; in a pipe as wide as they are, so that no cell is cut."""
    console = Terminal()
    if not console.is_terminal:
        console.width = 200
    for table in tables:
        console.print(table)


def follow(make: Callable[[], Table], every_s: float = 2.0) -> None:
    """Draw a table again and again, until Ctrl-C."""
    try:
        with Live(make(), auto_refresh=False, screen=Terminal().is_terminal) as live:
            while True:
                time.sleep(every_s)
                live.update(make(), refresh=True)
    except KeyboardInterrupt:
        return


def proof_table(results: "Sequence[Result]", name: str, steps: int) -> Table:
    table = Table(title=f"{name}: the first {plural(steps, 'step')}", title_justify="left")
    for title in ("run", "compared with", "samples", "weights differ by", ""):
        table.add_column(title)
    for r in results:
        run = plural(r.ranks, "rank")
        if r.killed_at is not None:
            run += f", killed after step {r.killed_at}, resumed from step {r.resumed_from}"
        samples = f"same in {plural(r.batches, 'micro-batch')}" if r.same_samples else "DIFFERENT"
        difference = "nothing, bit for bit" if r.difference == 0 else f"{r.difference:.1e}"
        limit = f" (limit {r.limit:.0e})" if r.difference else ""
        verdict = Text("passed", "green") if r.passed else Text("FAILED", "bold red")
        table.add_row(run, r.compared_with, samples, difference + limit, verdict)
    return table


def runs_table(runs: Sequence[RunInfo]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "best val", "last record", "job"):
        table.add_column(title, no_wrap=True)
    for info in runs:
        steps = f"{info.step}/{info.total_steps}" if info.total_steps else str(info.step)
        best = best_score(info.best_accuracy, info.best_score) or ""
        age = f"{duration(info.age_s)} ago"
        state = _state(info.state)
        if info.waits_for not in (None, "None", "Priority"):
            state.append(f" ({info.waits_for})")
        table.add_row(info.name, state, steps, best, age, info.job or "")
    return table


def best_score(accuracy: float | None, other: Mapping[str, float] | None) -> str | None:
    """The best validation score of a run, with its name where it is no accuracy."""
    found = other or ({} if accuracy is None else {ACCURACY.key: accuracy})
    judge = judged_in(found)
    return None if judge is None else judge.said(found[judge.key])


def status_table(values: Mapping[str, Any]) -> Table:
    rows: dict[str, Any] = {
        "run": values["path"],
        "branched off": _maybe(values["forked_from"], "step {0[step]} of {0[run]}".format),
        "state": _state(values["state"]),
        "step": f"{values['step']} of {values['total_steps'] or 'unknown'}",
        "job": values["job"],
        "waits for": values["waits_for"],
        "the job ended": values["job_ended"],
        "time left": _maybe(values["seconds_left"], duration),
        "processes": _maybe(values["world_size"], str),
        "device": values["device"],
        "starts": str(values["starts"]),
        "loss": _maybe(values["loss"], "{:.4f}".format),
        "learning rate": _maybe(values["lr"], "{:.4g}".format),
        "images/s": _maybe(values["images_per_s"], "{:,.0f}".format),
        "MFU": _maybe(values["mfu"], "{:.1%}".format),
        "slowest": _maybe(values["slowest"], "rank {0[rank]} in {0[phase]}".format),
        "alerts": ", ".join(f"{e['kind']} at step {e.get('step')}" for e in values["alerts"])
        or None,
        "best val": best_score(values["best_accuracy"], values["best_score"]),
        "checkpoints": ", ".join(values["checkpoints"]) or None,
        "last record": f"{duration(values['age_s'])} ago",
        "report": values["report"],
    }
    return two_columns(rows)


def rates_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What learns at which rate, by stage from the lowest on; rates are before the schedule."""
    table = Table(title="what learns, before the schedule", title_justify="left")
    for title in ("stage", "tensors", "parameters", "rate", "weight decay", "learns"):
        right = title not in ("stage", "learns")
        table.add_column(title, justify="right" if right else "left")
    for row in rows:
        start = row["start"]
        learns = f"from step {start:,}" if start else "from the start"
        table.add_row(
            row["stage"],
            f"{row['tensors']:,}",
            f"{row['parameters']:,}",
            "" if row["lr"] is None else f"{row['lr']:.4g}",
            "" if row["lr"] is None else f"{row['weight_decay']:g}",
            "frozen" if row["lr"] is None else learns,
        )
    return table


def _target_tables(splits: Mapping[str, Any]) -> list[Table]:
    """Of each number that samples stand for, its range in each split."""
    found = {name: split["targets"] for name, split in splits.items() if "targets" in split}
    if not found:
        return []
    table = Table(title="targets: least / mean / largest", title_justify="left")
    for title in ("target", *found):
        table.add_column(title, justify="right")
    most = max(map(len, found.values()))
    for k in range(min(most, _SHOWN_CLASSES)):
        rows = [each[k] if k < len(each) else None for each in found.values()]
        spans = [row and [f"{row[name]:.4g}" for name in ("min", "mean", "max")] for row in rows]
        cells = [" / ".join(span or ()) for span in spans]
        table.add_row(str(k), *cells)
    if most > _SHOWN_CLASSES:
        table.caption = f"and {most - _SHOWN_CLASSES:,} more; --json shows all"
    return [table]


def inspect_tables(found: Mapping[str, Any]) -> list[Table]:
    """One table of the splits, one of their labels, and copies where there are any."""
    splits = Table(title=found["root"], title_justify="left")
    columns = ("image, kB", "short side", "resolutions", "formats")
    for title in ("split", "samples", "shards", "size", *columns):
        splits.add_column(title)
    splits.caption = "kB and short side in pixels: smallest / median / largest"
    if any(split["looked_at"] < split["samples"] for split in found["splits"].values()):
        most = max(split["looked_at"] for split in found["splits"].values())
        splits.caption += f"\npixels and formats: of {plural(most, 'image')}; --verify looks at all"
    labels = Table(title="samples by class", title_justify="left")
    labels.add_column("class")
    for name, split in found["splits"].items():
        labels.add_column(name, justify="right")
        looked_at = split["looked_at"]
        common = [
            f"{r['width']}x{r['height']} {r['images'] / looked_at:.0%}"
            for r in split["resolutions"][:2]
        ]
        splits.add_row(
            name,
            f"{split['samples']:,}",
            f"{split['shards']:,}",
            f"{split['bytes'] / 1e6:,.1f} MB",
            _span(split["image_bytes"], 1000),
            _span(split["short_side"]),
            ", ".join(common),
            ", ".join(f"{form} {n / looked_at:.0%}" for form, n in split["formats"].items()),
        )
    classes = list(dict.fromkeys(c for s in found["splits"].values() for c in s["labels"]))
    for label in classes[:_SHOWN_CLASSES]:
        counts = [s["labels"].get(label, 0) for s in found["splits"].values()]
        labels.add_row(label, *(f"{count:,}" for count in counts))
    if len(classes) > _SHOWN_CLASSES:
        labels.caption = f"and {len(classes) - _SHOWN_CLASSES:,} more; --json shows all classes"
    empty = [f"{s['empty_classes']:,} in {n}" for n, s in found["splits"].items()]
    if any(split["empty_classes"] for split in found["splits"].values()):
        labels.caption = f"{labels.caption or ''}\nclasses without a sample: {', '.join(empty)}"
        labels.caption = labels.caption.strip()
    tables = [splits, labels, *_target_tables(found["splits"])]
    passed_over = {
        f"{what} in {name}": f"{count:,}"
        for name, split in found["splits"].items()
        for what, count in split["passed_over"].items()
    }
    left_out = {
        f"{row['reason']} {row['extension']}": f"{row['count']:,}" for row in found["left_out"]
    }
    if passed_over or left_out:
        tables.append(two_columns({"left out or passed over": "", **left_out, **passed_over}))
    if found["duplicates"]:
        copies = {place: plural(count, "image") for place, count in found["duplicates"].items()}
        tables.append(two_columns({"the same bytes more than once": "", **copies}))
    return tables


def journal_tables(journal: Mapping[str, Any]) -> list[Table]:
    """One table of the samples that a run could not read, one of their shards and reasons."""
    bad = Table(title=f"{journal['run']}: what could not be read", title_justify="left")
    for title in ("sample", "shard", "byte", "reason", "substituted by", "steps"):
        bad.add_column(title, overflow="fold")
    for row in journal["bad"][:_SHOWN_SAMPLES]:
        bad.add_row(
            _sample(row),
            str(row["shard"]),
            "" if row["offset"] is None else f"{row['offset']:,}",
            row["reason"],
            _some([_sample(other) for other in row["substitutes"]]),
            _some(list(map(str, row["steps"]))),
        )
    if len(journal["bad"]) > _SHOWN_SAMPLES:
        bad.caption = f"and {len(journal['bad']) - _SHOWN_SAMPLES:,} more; --json shows all"
    counts = Table(title="bad samples", title_justify="left")
    counts.add_column("by shard, and by reason")
    counts.add_column("samples", justify="right")
    for name in ("shards", "reasons"):
        for place, count in list(journal[name].items())[:_SHOWN_CLASSES]:
            counts.add_row(place, f"{count:,}", end_section=place == list(journal[name])[-1])
    counts.add_row("all", f"{journal['samples']:,}")
    return [bad, counts]


def _sample(row: Mapping[str, Any]) -> str:
    return str(row["sample"] if row["key"] is None else row["key"])


def _some(values: Sequence[str]) -> str:
    shown = ", ".join(values[:3])
    return shown if len(values) <= 3 else f"{shown} and {len(values) - 3:,} more"


def _span(values: Mapping[str, float], unit: float = 1) -> str:
    """Smallest, median and largest; one number where all are alike."""
    some = [values.get(name, 0) / unit for name in ("min", "median", "max")]
    texts = [f"{v:,.3g}" if v < 100 else f"{v:,.0f}" for v in some]
    return " / ".join(texts if some[0] < some[2] else texts[:1])


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
    """A value of a run's records; one of another kind, as damage makes it, as it stands there."""
    try:
        return None if value is None else str(form(value))
    except (TypeError, ValueError, LookupError, AttributeError):
        return f"{str(value)[:80]} (damaged)"
