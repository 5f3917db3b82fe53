"""The runs there are, read from their directories: no daemon, no database."""

import json
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir, read_jsonl

# A run on another machine cannot be asked whether it lives: this long without a record, and
# it counts as killed.
_SILENT_S = 900.0


@dataclass(frozen=True)
class RunInfo:
    """One line of `bigbatch runs`. `age_s` is the time since the last record."""

    name: str
    path: str
    state: str  # new, running, stopped, failed, finished, killed or unreadable
    step: int
    total_steps: int | None
    best_accuracy: float | None  # on the validation split
    age_s: float


def find_run(name: str, runs: Path) -> RunDir:
    """A run by its directory, or by its name below `runs`."""
    for path in (Path(name), runs / name):
        if (path / "recipe.yaml").is_file():
            return RunDir(path)
    raise UserError(
        f"no run {name!r}: neither {name} nor {runs / name} holds a recipe.yaml; "
        "`bigbatch runs` lists the runs there are"
    )


def list_runs(runs: Path) -> list[RunInfo]:
    """All runs below a folder, the one with the newest record first."""
    if not runs.is_dir():
        return []
    found = [describe(RunDir(p.parent)) for p in runs.glob("*/recipe.yaml")]
    return sorted(found, key=lambda info: info.age_s)


def describe(run: RunDir, now: float | None = None) -> RunInfo:
    """What the files of a run say. Never fails: a damaged run is listed as unreadable."""
    now = time.time() if now is None else now
    try:
        changed = [p.stat().st_mtime for p in _records(run) if p.exists()]
        age = max(0.0, now - max(changed))
        events = read_jsonl(run.events)
        starts = [e for e in events if e.get("kind") == "start"]
        step, best = _progress(run.metrics)
        totals = [int(e["total_steps"]) for e in starts if e.get("total_steps") is not None]
        state = _state(run, events, age)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return RunInfo(run.name, str(run.path), "unreadable", 0, None, None, 0.0)
    return RunInfo(
        run.name, str(run.path), state, step, totals[-1] if totals else None, best, round(age, 1)
    )


def status(run: RunDir) -> dict[str, Any]:
    """All that a person asks of one run, in plain values."""
    info = describe(run)
    starts = [e for e in read_jsonl(run.events) if e.get("kind") == "start"]
    records = [r for r in read_jsonl(run.metrics) if r.get("kind") == "train"]
    last = records[-1] if records else {}
    left = None
    if info.total_steps and info.state == "running" and records:
        recent = [r["step_s"] for r in records[-20:] if r.get("step_s")]
        left = (info.total_steps - info.step) * sum(recent) / max(1, len(recent))
    start = starts[-1] if starts else {}
    return {
        **asdict(info),
        "starts": len(starts),
        "world_size": start.get("world_size"),
        "device": start.get("device"),
        "loss": last.get("loss"),
        "lr": last.get("lr"),
        "images_per_s": last.get("images_per_s"),
        "seconds_left": left,
        "checkpoints": sorted(p.name for p in run.checkpoints.glob("step-????????")),
        "summary": _json(run.summary),
        "report": str(run.report) if run.report.exists() else None,
    }


def _records(run: RunDir) -> tuple[Path, ...]:
    return (run.recipe_file, run.metrics, run.events)


def _state(run: RunDir, events: list[dict[str, Any]], age: float) -> str:
    last = [e for e in events if e.get("kind") in ("start", "end")]
    if not last:
        return "new"
    if last[-1]["kind"] == "end":
        return str(last[-1].get("state", "stopped"))
    host, pid = last[-1].get("host"), last[-1].get("pid")
    if host == socket.gethostname() and pid is not None:
        return "running" if _is_worker(int(pid)) else "killed"
    return "running" if age < _SILENT_S else "killed"


def _is_worker(pid: int) -> bool:
    try:
        return b"bigbatch.trainers.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _progress(metrics: Path) -> tuple[int, float | None]:
    """The last step, and the best validation accuracy so far.

    Long runs have a million records, so only the lines that say this are parsed.
    """
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    last = next(filter(None, map(_parse, reversed(lines))), {})
    evals = [_parse(line) for line in lines if b'"eval"' in line and b'"val"' in line]
    accuracies = [float(e["accuracy"]) for e in evals if e and e.get("accuracy") is not None]
    return int(last.get("step", 0)), max(accuracies, default=None)


def _parse(line: bytes) -> dict[str, Any] | None:
    """One record; None where a power cut tore the line."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
