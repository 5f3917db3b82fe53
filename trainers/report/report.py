"""report.html: one self-contained page about a run, finished or not. Free of torch."""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import write_atomically
from bigbatch.configs.judged import ACCURACY, judged_in, shown
from bigbatch.configs.load import dump_recipe
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.configs.targets import learns_targets
from bigbatch.configs.words import plural
from bigbatch.trainers.advice.advise import measure_phases
from bigbatch.trainers.monitoring.history import (
    History,
    confused_pairs,
    read_history,
    straggler,
)
from bigbatch.trainers.monitoring.progress import duration
from bigbatch.trainers.report import plots
from bigbatch.trainers.report.answers import shown_answers
from bigbatch.trainers.report.diagnosis import diagnose
from bigbatch.trainers.report.evaluations import shown_evaluations
from bigbatch.trainers.report.results import COMBINED, figure, judge_of, result_rows
from bigbatch.trainers.report.svg import png_uri

_SHOWN_RANKS = 16
_MOST_CLASSES = 50  # of which a confusion matrix is more than specks
_MOST_RECALLS = 1000  # classes in the page's table; evaluation.json has all
_HARDEST = 25  # of more than that, so many are shown


def write_report(run: RunDir, history: History | None = None) -> Path:
    """Write report.html into a run directory, from what is there so far; return its path.

    `history` is what was read of it already. Raises UserError where `run` is no run directory.
    """
    history = history or read_history(run)
    rows = result_rows(history.summary or {})
    page = _template().render(
        history=history,
        batch=_batch(history.recipe),
        tiles=_tiles(history),
        findings=diagnose(history),
        curves=plots.curves(history),
        ranks=_ranks(history),
        straggler=straggler(history.slowest),
        phases_plot=plots.phases(history),
        noise_plot=_noise_plot(history),
        trust_plot=plots.trust(history.trust),
        rows=rows,
        members_plot=_members_plot(history),
        measures={score.key: score.title for score in shown(judge_of(rows))},
        splits=[s for s in ("val", "test") if s in (history.summary or {})],
        combined=COMBINED,
        answers="ensemble" if "ensemble" in {name for name, *_ in rows} else "model",
        most_recalls=_MOST_RECALLS,
        confusion=_confusion(history),
        numbers=shown_answers(history.answers),
        classifier=not learns_targets(history.recipe),
        evaluations=shown_evaluations(run),
        augmented=png_uri(run.contact_sheet),
        timeline=_timeline(history),
        recipe=dump_recipe(history.recipe),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    write_atomically(run.report, page)
    return run.report


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,  # names of classes and runs come from outside
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "plural": plural}
    source = Path(__file__).with_name("report.html")
    return environment.from_string(source.read_text(encoding="utf-8"))


def _tiles(history: History) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the figures at the top of the page."""
    tiles = []
    summary = history.summary or {}
    for split in ("test", "val"):
        figures = summary.get(split) or {}
        ensemble, members = figures.get("ensemble"), figures.get("members") or []
        judge = judged_in(ensemble or {}) or ACCURACY
        if ensemble and members and ensemble[judge.key] is not None:
            best = max(members, key=judge.merit)[judge.key]
            alone = str(members[0]["name"]) if len(members) == 1 else None
            remark = alone or f"ensemble; best member {judge.text(best)}"
            tiles.append((f"{split} {judge.title}", judge.text(ensemble[judge.key]), remark))
    val = history.evals.get("val", {})
    if not summary and (by := judged_in(val)):
        values = val[by.key]
        best = np.nanmax(values) if by.more_is_better else np.nanmin(values)
        tiles.append((f"val {by.title}", by.text(values[-1]), f"best {by.text(best)}"))
    total = history.total_steps
    remark = f"of {total:,}" if total else ""
    tiles.append(("steps", f"{history.last_step:,}", remark))
    samples = history.samples
    tiles.append(("images trained on", _short_count(samples), f"{_batch(history.recipe)} a step"))
    if "step_s" in history.train:
        seconds = history.train["step_s"]
        rate = float(history.batches.mean()) / float(np.nanmean(seconds))
        tiles.append(("images per second", f"{rate:,.0f}", f"{np.nanmean(seconds):.3g} s a step"))
        whole = samples / rate
        if "mfu" in history.train:
            mfu = float(np.nanmean(history.train["mfu"]))
            tiles.append(("model FLOPs utilisation", f"{mfu:.1%}", "of the devices' peak"))
        tiles.append(("training time", duration(whole), f"ranks: {_world_sizes(history)}"))
    wall = wall_seconds(history.events)
    if wall:
        starts = plural(sum(e["kind"] == "start" for e in history.events), "start")
        tiles.append(("wall time", duration(wall), f"{starts}; also evaluation, saving"))
    return tiles


def _batch(recipe: Recipe) -> str:
    """The samples of a step: of a batch that changes the smallest and the largest one."""
    least, most = recipe.smallest_batch, recipe.largest_batch
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def wall_seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Seconds from each start to the last event before the next one, added up."""
    whole, began, last = 0.0, None, 0.0
    for event in events:
        now = event.get("time")
        if not isinstance(now, int | float):
            continue
        if event["kind"] == "start":
            whole += last - began if began is not None else 0.0
            began = last = float(now)
        last = max(last, float(now))
    return whole + (last - began if began is not None else 0.0)


def _ranks(history: History) -> dict[str, Any] | None:
    """Milliseconds of a step by phase, of each rank; of many ranks, those that work longest."""
    if not history.ranks:
        return None
    phases = [str(name) for name in history.ranks["phases"]]
    table = 1000 * np.array(history.ranks["seconds"], dtype=np.float64)
    own = table[:, [i for i, name in enumerate(phases) if name != "reduce"]].sum(1)
    shown = np.sort(np.argsort(-own, kind="stable")[:_SHOWN_RANKS]).tolist()
    return {
        "phases": phases,
        "rows": [(rank, table[rank].tolist(), float(own[rank])) for rank in shown],
        "left_out": len(table) - len(shown),
        "step": history.ranks["step"],
    }


def _world_sizes(history: History) -> str:
    sizes = dict.fromkeys(str(e["world_size"]) for e in history.events if "world_size" in e)
    return ", then ".join(sizes) or str((history.summary or {}).get("world_size", "not recorded"))


def _short_count(count: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= 10 * size:
            return f"{count / size:,.1f}{unit}"
    return f"{count:,}"


def _noise_plot(history: History) -> str:
    """The gradient noise scale; its phases only where they are long enough to measure."""
    try:
        phases = measure_phases(history, None)
    except UserError:
        phases = []
    return plots.noise(history, phases)


def _members_plot(history: History) -> str:
    rows = result_rows(history.summary or {})
    return plots.members(rows) if rows else ""


def _confusion(history: History) -> dict[str, Any] | None:
    """The plot, the most frequent mistakes and the weakest classes of confusion.json."""
    if not history.confusion:
        return None
    classes = [str(name) for name in history.confusion["classes"]]
    pairs = confused_pairs(history.confusion)
    true, predicted, counts = pairs.T
    amiss = pairs[true != predicted]
    mistakes = amiss[np.argsort(-amiss[:, 2], kind="stable")[:8]].tolist()
    images = np.bincount(true, counts, len(classes)).astype(np.int64)  # [C], of true classes
    missed = np.bincount(amiss[:, 0], amiss[:, 2], len(classes)).astype(np.int64)
    taken = np.bincount(amiss[:, 1], amiss[:, 2], len(classes)).astype(np.int64)
    recall = (images - missed) / np.maximum(images, 1)
    there = images > 0
    shown = np.arange(len(classes))
    if len(classes) > _MOST_CLASSES:
        shown = hardest(images, missed, taken)
    matrix = np.zeros((len(shown), len(shown)), np.int64)
    inside = np.isin(true, shown) & np.isin(predicted, shown)
    places = np.searchsorted(shown, pairs[inside, :2])
    matrix[places[:, 0], places[:, 1]] = counts[inside]
    by_recall = np.argsort(np.where(there, recall, 2.0), kind="stable")[: int(there.sum())]
    return {
        "split": history.confusion.get("split", "test"),
        "plot": plots.confusion([classes[i] for i in shown], matrix, images[shown]),
        "shown": len(shown),
        "classes": len(classes),
        "balanced": float(recall[there].mean()) if there.any() else None,
        "total": int(images.sum()),
        "wrong": int(missed.sum()),
        "mistakes": [(classes[i], classes[j], n) for i, j, n in mistakes],
        "recalls": [(classes[i], float(recall[i]), int(images[i])) for i in by_recall],
    }


def hardest(
    images: NDArray[np.int64], missed: NDArray[np.int64], taken: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The classes [k] that are in most mistakes, in the order of the classes.

    A class counts by the share of its `images` [C] that are `missed`, and of others' `taken`
    for it.
    """
    share = (missed + taken) / np.maximum(images, 1)
    return np.sort(np.argsort(-share, kind="stable")[:_HARDEST])


def _timeline(history: History) -> list[tuple[str, str, str, str]]:
    """(time, step, what, details) of each event; checkpoints in a row are one."""
    rows = []
    for kind, group in itertools.groupby(history.events, lambda event: str(event["kind"])):
        events = list(group)
        if kind == "checkpoint" and len(events) > 1:
            steps = [event.get("step", "") for event in events]
            what = f"{len(events):,} checkpoints"
            rows.append((_stamp(events[-1]), f"{steps[0]} to {steps[-1]}", what, ""))
        else:
            rows += [_row(event) for event in events]
    return rows


def _row(event: Mapping[str, Any]) -> tuple[str, str, str, str]:
    kind = str(event["kind"])
    if kind == "start" and event.get("step"):
        kind = "resume"
    if kind == "end":
        kind = str(event.get("state", "end"))
    known = ("time", "date", "kind", "step", "state", "pid")
    details = ", ".join(
        f"{k} {_cut(v)}" for k, v in event.items() if k not in known and v is not None
    )
    return _stamp(event), str(event.get("step", "")), kind.replace("_", " "), details


def _stamp(event: Mapping[str, Any]) -> str:
    return str(event.get("date", ""))[:19].replace("T", " ")


def _cut(value: Any) -> str:
    """A value as text; of a long one, such as a traceback, the beginning."""
    text = str(value)
    return text if len(text) <= 1000 else f"{text[:1000]} ..."
