"""A run directory read back, whole or unfinished: what the views of a run are made of.

Free of torch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.data.journal import count, read_journal

Record = Mapping[str, Any]  # of metrics.jsonl
Columns = dict[str, NDArray[np.float64]]  # equally long, "step" ascending; NaN: no finite value

PHASE_NAMES = {
    "data": "waiting for data",
    "copy": "copying to the device",
    "augment": "augmentation",
    "model": "forward and backward",
    "reduce": "exchange between ranks",
    "optimizer": "the optimizer",
}


@dataclass(frozen=True)
class History:
    """All that a run directory holds of a run; what is not there yet is None or empty."""

    name: str
    recipe: Recipe
    manifest: Mapping[str, Any]
    train: Columns
    evals: Mapping[str, Columns]  # by split
    trust: Columns  # trust ratios by parameter
    ranks: Mapping[str, Any] | None  # the last record of seconds by rank and phase
    slowest: Mapping[str, Any] | None  # the straggler of the last record, if there is one
    events: list[dict[str, Any]]
    summary: Mapping[str, Any] | None
    confusion: Mapping[str, Any] | None
    snapshots: list[int]  # steps
    bad_samples: Mapping[str, Any] | None = None  # counts; None where everything could be read
    probes: Sequence[Record] = ()  # closer looks at some evaluations (evaluation/probe.py)
    gradients: Sequence[Record] = ()  # norms by weight: of the first step, and beside probes

    @property
    def last_step(self) -> int:
        return int(self.train["step"][-1]) if self.train else 0

    @property
    def total_steps(self) -> int | None:
        """The steps that the recipe asks for; None where no start recorded them."""
        known = [e["total_steps"] for e in self.events if "total_steps" in e]
        return int(known[-1]) if known else (self.summary or {}).get("steps")

    @property
    def state(self) -> str:
        """finished, stopped or failed, as the last attempt ended; otherwise "running".

        "running" is also what a killed run looks like from its files alone.
        """
        last = [e for e in self.events if e["kind"] in ("start", "end")]
        if not last:
            return "not started"
        return str(last[-1].get("state", "running"))


def read_history(run: RunDir) -> History:
    """Read a run directory. Raises UserError where it is none."""
    recipe = run.recipe()
    records = [r for r in read_jsonl(run.metrics) if "kind" in r]
    splits = dict.fromkeys(str(r.get("split")) for r in records if r["kind"] == "eval")
    journal = read_journal(run.path)
    snapshots = [read_json(path) for path in run.snapshots.glob("cycle-*/metrics.json")]
    return History(
        name=run.name,
        recipe=recipe,
        manifest=read_json(run.manifest) or {},
        train=columns(r for r in records if r["kind"] == "train"),
        trust=columns({"step": r["step"], **r["ratios"]} for r in records if r["kind"] == "trust"),
        ranks=next((r for r in reversed(records) if r["kind"] == "ranks"), None),
        slowest=next((r.get("slowest") for r in reversed(records) if r["kind"] == "train"), None),
        evals={s: columns(r for r in records if r.get("split") == s) for s in splits},
        events=[e for e in read_jsonl(run.events) if "kind" in e],
        summary=read_json(run.summary),
        confusion=read_json(run.ensemble / "confusion.json"),
        snapshots=sorted(int(s["step"]) for s in snapshots if s),
        bad_samples=count(journal) if journal else None,
        probes=[r for r in records if r["kind"] == "probe"],
        gradients=[r for r in records if r["kind"] == "gradients"],
    )


def columns(records: Iterable[Mapping[str, Any]]) -> Columns:
    """Records as float64 columns: a value that is null or missing is NaN.

    A column without one number is left out, as are texts. {"phases": {"data": 1.0}} makes a
    column "phases.data".
    """
    rows = [_flat(record) for record in records]
    names = dict.fromkeys(name for row in rows for name in row)
    arrays = {n: np.array([_number(row.get(n)) for row in rows], dtype=np.float64) for n in names}
    return {name: array for name, array in arrays.items() if np.isfinite(array).any()}


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        inner = value if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return flat


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def loss_ceiling(history: History) -> float:
    """Where a plot of the losses may end at the top.

    One bad evaluation at a high learning rate must not flatten all the rest.
    """
    losses = [np.nanpercentile(history.train["loss"], 99)]
    losses += [np.nanpercentile(c["nll"], 75) for c in history.evals.values() if "nll" in c]
    return 1.15 * float(np.nanmax(losses))


def read_json(path: Any) -> dict[str, Any] | None:
    """A JSON object; None where the file is missing, or is no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def smooth(values: NDArray[np.float64], weight: float = 0.9) -> NDArray[np.float64]:
    """Exponential moving average over the finite values, without the bias to the first one.

    The weight of the past is at most `weight`; NaN is stepped over (Kingma and Ba 2015, 3,
    for the correction).
    """
    result = np.full(len(values), np.nan)
    total, norm = 0.0, 0.0
    for i, value in enumerate(values.tolist()):
        if value == value:
            total = weight * total + (1 - weight) * value
            norm = weight * norm + (1 - weight)
        if norm:
            result[i] = total / norm
    return result


def straggler(slowest: Mapping[str, Any] | None) -> str | None:
    """The record of the slowest rank as a sentence."""
    if not slowest:
        return None
    where = f", mostly on shard {slowest['shard']}" if "shard" in slowest else ""
    doing = PHASE_NAMES.get(str(slowest["phase"]), str(slowest["phase"]))
    return (
        f"rank {slowest['rank']} is the slowest: {slowest['share']:.0%} of a step longer than the "
        f"median rank in {doing}{where}"
    )
