"""A run directory read back, whole or unfinished: what the views of a run are made of.

Free of torch.
"""

import math
import re
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.configs.decisions import recipe_of
from bigbatch.configs.files import iter_lines, read_json
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.rundir import ANSWERS, RunDir, event_record
from bigbatch.configs.schema import Recipe
from bigbatch.data.journal import count, read_journal

Record = Mapping[str, Any]  # of metrics.jsonl
_FIRST_EVENTS, _NEWEST_EVENTS = 100, 1000
_LONGEST_EVENT = 1 << 16
# Records of each kind that are taken at least, where there are more of them.
_MOST = {"train": 1 << 14, "eval": 1 << 12, "trust": 1 << 10, "ranks": 1, "probe": 256}
_MOST |= {"gradients": 256}
_KIND = re.compile(rb'"kind": ?"(\w+)"')
_TIMED = re.compile(rb'\{"kind": ?"train", ?"step": ?(\d+),.*"step_s": ?(\d[0-9.eE+-]*)')
_SPLIT = re.compile(rb'"split": ?"([^"]*)"')
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
    answers: Mapping[str, Any] | None = None  # targets.json of a run that learned numbers
    probes: Sequence[Record] = ()  # closer looks at some evaluations (evaluation/probe.py)
    gradients: Sequence[Record] = ()  # norms by weight: of the first step, and beside probes

    @property
    def last_step(self) -> int:
        return int(self.train["step"][-1]) if self.train else 0

    @property
    def samples(self) -> int:
        """Of all finished steps that have a record."""
        if not isinstance(self.recipe.global_batch, int) and "samples" in self.train:
            return int(self.train["samples"][-1])
        # Also of a branch that has none but its parent's records, whose batch was a number.
        return self.last_step * self.recipe.first_batch

    @property
    def batches(self) -> NDArray[np.float64]:
        """The samples of each recorded step."""
        first = float(self.recipe.first_batch)
        count = len(self.train["step"]) if self.train else 0
        found = self.train.get("global_batch", np.full(count, first))
        # A branch has records of its parent, whose batch was a number.
        return np.where(np.isnan(found), first, found)

    @property
    def total_steps(self) -> int | None:
        """The steps that the recipe asks for; None where no start recorded them."""
        known = [e.get("total_steps") for e in self.events]
        found = [steps for steps in known if isinstance(steps, int)]
        return found[-1] if found else (self.summary or {}).get("steps")

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
    """Read a run directory. Raises UserError where it is none.

    Of very many records of one kind every so many are taken, the first ones and the newest among
    them: a plot shows no more, and a run of a year is read in seconds.
    """
    recipe = recipe_of(run)
    found = read_records(run.metrics)
    train, ranks = found.get("train", []), found.get("ranks", [])
    evals: dict[str, list[Record]] = {}
    for record in found.get("eval", []):
        evals.setdefault(str(record.get("split")), []).append(record)
    trust = ({"step": r["step"], **r["ratios"]} for r in found.get("trust", []))
    journal = read_journal(run.path)
    snapshots = [read_json(path) for path in run.snapshots.glob("cycle-*/metrics.json")]
    return History(
        name=run.name,
        recipe=recipe,
        manifest=read_json(run.manifest) or {},
        train=columns(train),
        trust=columns(trust),
        ranks=ranks[-1] if ranks else None,
        slowest=train[-1].get("slowest") if train else None,
        evals={split: columns(records) for split, records in evals.items()},
        events=read_events(run),
        summary=read_json(run.summary),
        confusion=_sound_confusion(read_json(run.ensemble / "confusion.json") or {}),
        snapshots=sorted(int(s["step"]) for s in snapshots if s),
        bad_samples=count(journal) if journal else None,
        probes=found.get("probe", []),
        gradients=found.get("gradients", []),
        answers=read_json(run.ensemble / ANSWERS),
    )


def read_records(metrics: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of metrics.jsonl by kind, oldest first, of the kinds that views show.

    The file is read once, and of a kind no more lines are parsed than twice those of `_MOST`.
    """
    thinned: dict[tuple[str, bytes], _Thinned] = {}
    for line in iter_lines(metrics):
        if (match := _KIND.search(line)) is None or (kind := match[1].decode()) not in _MOST:
            continue
        split = _SPLIT.search(line) if kind == "eval" else None
        key = kind, split[1] if split else b""
        if key not in thinned:
            thinned[key] = _Thinned(_MOST[kind])
        thinned[key].add(line)
    found: dict[str, list[dict[str, Any]]] = {}
    for (kind, _), lines in thinned.items():
        for line in lines.kept():
            try:
                record = parse_json(line)
            except ValueError:  # torn by a power cut; the next attempt writes that step again
                continue
            if isinstance(record, dict) and record.get("kind") == kind:
                found.setdefault(kind, []).append(record)
    return found


def timed_steps(metrics: Path) -> Iterator[tuple[int, float]]:
    """(step, seconds) of each train record, oldest first, at a fraction of what parsing costs."""
    for line in iter_lines(metrics, b'"train"'):
        if found := _TIMED.match(line):
            yield int(found[1]), float(found[2])


class _Thinned:
    """Lines as they come; of more than twice `most` every so many, the first `most` // 256 and
    the newest one, so that their number stays below that."""

    def __init__(self, most: int) -> None:
        self._most, self._every, self._count = most, 1, 0
        self._first: list[bytes] = []
        self._lines: list[bytes] = []
        self._last: bytes | None = None  # where it is in neither

    def add(self, line: bytes) -> None:
        if len(self._first) < self._most // 256:
            self._first.append(line)
            return
        self._last = line
        if self._count % self._every == 0:
            self._lines.append(line)
            self._last = None
            if len(self._lines) > 2 * self._most:
                del self._lines[1::2]
                self._every *= 2
        self._count += 1

    def kept(self) -> list[bytes]:
        return [*self._first, *self._lines, *([] if self._last is None else [self._last])]


def as_finished(history: History, summary: Mapping[str, Any]) -> History:
    """What the history of a run that is about to be finished will be."""
    end = event_record("end", history.last_step, state="finished")
    return replace(history, summary=summary, events=[*history.events, end])


def read_events(run: RunDir) -> list[dict[str, Any]]:
    """The events of a run, oldest first. Of very many, what a page or a screen can show.

    These are the first 100, the newest 1,000, and the newest 1,000 starts and ends; in place
    of others stands one of kind "left_out" that counts them.
    """
    first: list[tuple[int, bytes]] = []
    newest: deque[tuple[int, bytes]] = deque(maxlen=_NEWEST_EVENTS)
    turns: deque[tuple[int, bytes]] = deque(maxlen=_NEWEST_EVENTS)
    count = 0
    for count, line in enumerate(iter_lines(run.events), 1):
        if len(first) < _FIRST_EVENTS:
            first.append((count, line))
            continue
        newest.append((count, line))
        if b'"start"' in line or b'"end"' in line:
            turns.append((count, line))
    kept = dict([*first, *turns, *newest])
    events: list[dict[str, Any]] = []
    before = 0
    for number, line in sorted(kept.items()):
        if number > before + 1:
            events.append({"kind": "left_out", "events": number - before - 1})
        before = number
        try:
            event = parse_json(line[:_LONGEST_EVENT])
        except ValueError:  # torn, or as long as none of ours is
            continue
        if isinstance(event, dict) and "kind" in event:
            events.append(event)
    return events


def columns(records: Iterable[Mapping[str, Any]]) -> Columns:
    """Records as float64 columns: a value that is null or missing is NaN.

    A column without one number is left out, as are texts. {"phases": {"data": 1.0}} makes a
    column "phases.data".
    """
    found: dict[str, array[float]] = {}  # as records come, so that they need not be kept
    count = 0
    for record in records:
        for name, value in _flat(record).items():
            column = found.setdefault(name, array("d"))
            column.extend([math.nan] * (count - len(column)))
            column.append(_number(value))
        count += 1
    for column in found.values():
        column.extend([math.nan] * (count - len(column)))
    arrays = {name: np.frombuffer(column) for name, column in found.items() if count}
    return {name: values for name, values in arrays.items() if np.isfinite(values).any()}


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        inner = value if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return flat


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def loss_ceiling(history: History) -> float:
    """Where a plot of the losses may end at the top.

    One bad evaluation at a high learning rate must not flatten all the rest.
    """
    losses = [np.nanpercentile(history.train["loss"], 99)]
    losses += [np.nanpercentile(c["nll"], 75) for c in history.evals.values() if "nll" in c]
    return 1.15 * float(np.nanmax(losses))


def confused_pairs(table: Mapping[str, Any]) -> NDArray[np.int64]:
    """(true class, predicted class, count) [K, 3] of a confusion.json, of older versions too.

    Those wrote the matrix, which of many classes is nearly all zeros.
    """
    if "pairs" in table:
        return np.array(table["pairs"], dtype=np.int64).reshape(-1, 3)
    matrix = np.array(table["matrix"], dtype=np.int64)
    true, predicted = np.nonzero(matrix)
    return np.stack([true, predicted, matrix[true, predicted]], axis=1)


def _sound_confusion(table: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The table, or None where it is not what a run writes: it is as good as missing then."""
    try:
        pairs, classes = confused_pairs(table), len(table["classes"])
        sound = not len(pairs) or (pairs.min() >= 0 and pairs[:, :2].max() < classes)
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    return table if sound else None


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
