"""The certificate of an audit: what was checked and computed again, and what that does not prove.

Free of torch. Source of what it does not prove: Zhang et al. 2022, "Adversarial Examples" for
Proof-of-Learning, arXiv:2108.09454.
"""

import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json, write_atomically
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.words import plural
from bigbatch.trainers.ledger.audit import NOT_RECOMPUTED, Audit
from bigbatch.trainers.ledger.lines import Ledger
from bigbatch.trainers.replay.intervals import Interval, detection

FORMAT = 1
PASSED, FAILED, NOT_COMPARABLE = "passed", "failed", "not comparable"
SAME, DIFFERS = "same", "differs"  # what came of an interval, or NOT_COMPARABLE
STATUS = {PASSED: 0, FAILED: 1, NOT_COMPARABLE: 2}  # exit statuses
_TAMPERED = (1, 2, 5, 10)  # intervals, for which a chance is told
_NOT_PROVEN = (
    "This shows that what the run claims is consistent: recipe, data, records, ledger and "
    "checkpoints follow from each other. It does not show that the training was honest: who makes "
    "all of them together can make them agree (arXiv:2108.09454), and whether the data are what "
    "they are said to be, or held test images, is not looked at."
)
_NOT_COVERED = (
    "evaluations and the statistics they were made with, which are taken as recorded, and snapshots"
)

Certificate = dict[str, Any]


def certificate(
    run: RunDir,
    ledger: Ledger,
    files: Audit,
    every: Sequence[Interval],
    recomputed: Sequence[Any],
    draw: dict[str, Any] | None,
    environment: dict[str, Any] | None,
) -> Certificate:
    """The certificate as plain values. `recomputed` are recompute.Recomputed, as JSON.

    `draw` has fraction, seed and name; None: nothing was computed again, and neither was
    `environment`, that of this machine.
    """
    if recomputed:
        files.not_shown = [line for line in files.not_shown if line != NOT_RECOMPUTED]
    outcomes = [one["outcome"] for one in recomputed]
    differs = not files.passed or DIFFERS in outcomes
    verdict = FAILED if differs else NOT_COMPARABLE if NOT_COMPARABLE in outcomes else PASSED
    total, drawn = len(every), len(recomputed)
    step = max(ledger.steps, default=0)
    found: Certificate = {
        "format": FORMAT,
        "verdict": verdict,
        "run": run.name,
        "recipe_hash": recipe_hash(run.recipe()),
        "data_hash": ledger.steps[step].start.get("data_hash") if step else None,
        "ledger": {"step": step, "chain": ledger.chain},
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "bigbatch": metadata.version("bigbatch"),
        "environment": environment,
        "files": files.as_json(),
        "draw": draw,
        "intervals": {
            "total": total,
            "first": every[0].first if every else None,  # no step before it is in reach
            "last": every[-1].last if every else None,
            "steps": sum(one.steps for one in every),
            "recomputed": list(recomputed),
            "recomputed_steps": sum(one["last"] - one["first"] for one in recomputed),
        },
        "detection": {
            str(t): detection(total, drawn, t) for t in _TAMPERED if drawn and t <= total
        },
        "not_proven": _NOT_PROVEN,
    }
    return found | {"paragraph": paragraph(found)}


def write(path: Path, found: Certificate) -> None:
    """Write it as JSON. Raises UserError where it cannot be."""
    try:
        write_atomically(path, to_json(found, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


def verdict(found: Certificate) -> str:
    """The last line of what is said."""
    if found["verdict"] == FAILED:
        return "FAILED: the run is not what its ledger says"
    if found["verdict"] == NOT_COMPARABLE:
        return "not comparable: what was computed again differs, or could not be"
    return "passed"


def in_words(found: Certificate) -> list[str]:
    """Of what was computed again, a line each."""
    lines = []
    for one in found["intervals"]["recomputed"]:
        where = f"steps {one['first'] + 1:,} to {one['last']:,}"
        what = f"{plural(one['values'], 'value')}, {plural(one['lines'], 'line')} of the ledger"
        what += ", the checkpoint at the end" if one["checkpoint"] else ""
        if one["outcome"] == SAME:
            lines.append(f"recomputed {where}: the same, bit for bit: {what}")
            continue
        lines.append(f"recomputed {where}: {one['outcome']}")
        title = "CHANGED" if one["outcome"] == DIFFERS else "differs"
        lines += [f"  {title}: {line}" for line in one["findings"]]
        lines += [f"  reason: {line}" for line in one["reasons"]]
    if found["draw"] is not None:
        lines.append(f"drawn: {_drawn(found)}" + (f"; {_chances(found)}" if _made(found) else ""))
    return lines


def paragraph(found: Certificate) -> str:
    """The certificate for people, as a model card has it: Markdown, one paragraph."""
    files, own = found["files"], found["intervals"]
    parts = [
        f"Audit of {found['run']} up to step {found['ledger']['step']:,} (ledger "
        f"`{found['ledger']['chain']}`), {found['date'][:10]}, by bigbatch {found['bigbatch']}: "
        f"{found['verdict']}.",
        f"Checked: {plural(files['steps'], 'line')} of the ledger by their chain, "
        f"{plural(files['losses'], 'recorded loss')} and {plural(files['saves'], 'state')} of the "
        f"records, and {plural(len(files['checkpoints']), 'checkpoint')} by their digests.",
    ]
    if files["findings"]:
        parts.append(f"{plural(len(files['findings']), 'change')} found in them.")
    if found["draw"] is None:
        parts.append("No step was computed again.")
    else:
        where = found["environment"]
        parts.append(
            f"Computed again ({where['device']}, torch {where['torch']}): {_drawn(found)}."
        )
        parts += _outcomes(own["recomputed"])
        left = own["total"] - len(own["recomputed"])
        others = f"{plural(left, 'interval')}; " if left else ""
        parts.append(f"Not computed again: {others}{_NOT_COVERED}.")
        if _made(found):
            parts.append(f"{_chances(found).capitalize()}.")
    return " ".join([*parts, _NOT_PROVEN])


def _drawn(found: Certificate) -> str:
    own = found["intervals"]
    return (
        f"{len(own['recomputed'])} of {plural(own['total'], 'interval')} between checkpoints, "
        f"{own['recomputed_steps']:,} of {plural(own['steps'], 'step')}, at random by seed "
        f"{found['draw']['seed']}"
    )


def _made(found: Certificate) -> bool:
    """Whether anything was computed again that is on record."""
    return any(one["values"] for one in found["intervals"]["recomputed"])


def _chances(found: Certificate) -> str:
    told = [
        f"{chance:.3g} ({'one interval' if int(t) == 1 else f'{t} intervals'})"
        for t, chance in found["detection"].items()
    ]
    return f"what was tampered with is among them with a chance of {', '.join(told)}"


def _outcomes(recomputed: Sequence[dict[str, Any]]) -> list[str]:
    said = []
    same = [one for one in recomputed if one["outcome"] == SAME]
    if same:
        values, lines = (sum(one[name] for one in same) for name in ("values", "lines"))
        states = sum(one["checkpoint"] for one in same)
        said.append(
            f"The same, bit for bit, in {plural(len(same), 'interval')}: losses, gradient norms, "
            f"rates and digests ({plural(values, 'value')}; {plural(lines, 'line')} of the "
            "ledger), and weights, optimizer state and running statistics of "
            f"{plural(states, 'checkpoint')}."
        )
    for outcome, title in ((DIFFERS, "Different"), (NOT_COMPARABLE, "Not comparable")):
        own = [one for one in recomputed if one["outcome"] == outcome]
        if own:
            where = ", ".join(f"{one['first'] + 1:,} to {one['last']:,}" for one in own)
            said.append(f"{title}: steps {where}.")
    return said
