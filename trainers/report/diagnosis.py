"""What the records of a run say, in words. Free of torch.

Rules of thumb with their figures in the text, so that a reader can disagree with them;
docs/diagnosis.md has them in a table, with their sources.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigbatch.configs.judged import ACCURACY, judged_in
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.monitoring.history import Columns, History, confused_pairs, read_history
from bigbatch.trainers.report.broken import broken
from bigbatch.trainers.report.facts import Facts
from bigbatch.trainers.report.findings import Finding, choose
from bigbatch.trainers.report.fit import fit

_ORDER = ("problem", "note", "good")
_WAITED = 0.2  # of the step time, in waiting for data
_LITTLE_WAIT = 30.0  # s in all: of so short a run its share is no problem


def diagnose(history: History) -> list[Finding]:
    """Findings from the records, problems first; says so where there is too little to judge."""
    found = [*_data(history), *learning(history), *_speed(history), *_combination(history)]
    return sorted(found, key=lambda finding: _ORDER.index(finding.level))


def diagnose_run(run: RunDir) -> list[Finding]:
    """The findings of a run directory. Raises UserError where it is none."""
    return diagnose(read_history(run))


def learning(history: History) -> list[Finding]:
    """What the curves and probes say of learning: what broke it, or else how it fits.

    Of several findings the cause is told, not its consequences: a network whose units are dead
    also learns too little.
    """
    facts = Facts(history)
    found = broken(facts)
    if any(finding.level == "problem" for finding in found):
        return found
    if len(facts.step) < 20:
        text = "Fewer than 20 training steps are recorded."
        return [*found, Finding("note", "Too early to tell", text, "unfinished")]
    if not facts.over:
        # Before the learning rate has come down, and just after a restart, curves mislead.
        done, total = history.last_step, history.total_steps
        text = f"{done:,} of {total:,} steps are done; the fit is judged at the end."
        return [*found, Finding("note", "Not at the end yet", text, "unfinished")]
    return [*found, *fit(facts)]


def _data(history: History) -> Iterator[Finding]:
    bad = history.bad_samples
    if bad:
        reason = next(iter(bad["reasons"]))
        yield Finding(
            "problem",
            "Unreadable samples",
            f"{bad['samples']:,} samples in {len(bad['shards']):,} shards could not be read, most "
            f"often because: {reason}. `bigbatch inspect --journal {history.name}` lists each "
            "with its shard, its byte and what took its place.",
            "unreadable",
            {"samples": bad["samples"], "shards": len(bad["shards"])},
        )


def _speed(history: History) -> Iterator[Finding]:
    train: Columns = history.train
    if len(train.get("step", ())) < 20 or "data_s" not in train or "step_s" not in train:
        return
    # The first steps wait for the first batches, which says nothing about the rest.
    data, total = np.nansum(train["data_s"][5:]), np.nansum(train["step_s"][5:])
    share = data / total if total else 0.0
    if share > _WAITED:
        # Records may be of every so many steps.
        seconds = float(np.nanmean(train["data_s"][5:])) * history.last_step
        yield Finding(
            "problem" if seconds > _LITTLE_WAIT else "note",
            "Waiting for data",
            f"{share:.0%} of the step time, {seconds:,.0f} s in all, went into waiting for the "
            "loader. Raise data.workers, or pre-size images with `bigbatch shard --short-side`.",
            "waiting_for_data",
            {"share": share, "seconds": seconds},
            choose(history.recipe, [("data.workers", 2 * history.recipe.data.workers + 2)]),
        )
    else:
        text = f"{share:.1%} of the step time waited for data."
        yield Finding("good", "Data keeps up", text, "data_keeps_up", {"share": share})


def _combination(history: History) -> Iterator[Finding]:
    summary: Mapping[str, Any] = history.summary or {}
    split = "test" if summary.get("test") else "val"
    figures = summary.get(split) or {}
    members, ensemble = figures.get("members") or [], figures.get("ensemble")
    if len(members) < 2 or not ensemble or judged_in(ensemble) != ACCURACY:
        return
    best = max(m["accuracy"] for m in members)
    gain = 100 * (ensemble["accuracy"] - best)
    text = (
        f"Mean probability of the kept members scores {ensemble['accuracy']:.2%} on {split}, "
        f"{gain:+.2f} points against the best single member"
    )
    losses = [m["nll"] for m in members if m["nll"] is not None]  # null: it was not finite
    if losses and ensemble["nll"] is not None:
        text += f"; NLL {ensemble['nll']:.4f} against {min(losses):.4f}"
    text += "."
    # The binomial standard error: on a few hundred images one image more or less is noise.
    table = history.confusion or {}
    count = int(confused_pairs(table)[:, 2].sum()) if table.get("split") == split else 0
    error = 100 * float(np.sqrt(best * (1 - best) / count)) if count else 0.0
    if error:
        text += f" On {count:,} images one standard error is {error:.2f} points."
    evidence = {"gain": gain / 100, "standard_error": error / 100}
    if abs(gain) < 2 * error:
        title = "The ensemble makes no clear difference"
        yield Finding("note", title, text, "ensemble", evidence)
    elif gain > 0:
        yield Finding("good", "The ensemble helps", text, "ensemble", evidence)
    else:
        yield Finding("note", "The ensemble does not help", text, "ensemble", evidence)
