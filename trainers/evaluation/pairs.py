"""What two runs were both evaluated on, sample by sample. Free of torch."""

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import reason_of
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.evaluation.by_sample import BySample, compare_by_sample, read_outcomes
from bigbatch.trainers.evaluation.record import EVALUATION, SCORES, read_evaluation

_HOW = ("combination", "tta", "mc_dropout", "temperature")  # of an evaluation


def pair_evaluations(a: RunDir, b: RunDir) -> list[dict[str, Any]]:
    """A dictionary for each name below evaluations/ of either run, by name.

    Where both have outcomes by sample, it is what `compare_by_sample` finds, with `data_hash` of
    each, and `notes` on what else differs; elsewhere `problem` says in a line why there is none.
    """
    files = (p for r in (a, b) for f in (EVALUATION, SCORES) for p in r.evaluations.glob(f"*/{f}"))
    found = []
    for name in sorted({path.parent.name for path in files}):
        try:
            found.append({"name": name, "problem": None} | _pair(a, b, name))
        except ValueError as error:
            found.append({"name": name, "problem": str(error)})
    return found


def _pair(a: RunDir, b: RunDir, name: str) -> dict[str, Any]:
    sides = {"A": _read("A", a, name, b), "B": _read("B", b, name, a)}
    (first, ours), (second, theirs) = sides["A"], sides["B"]
    hashes = {side: about["data_hash"] for side, (about, _) in sides.items()}
    notes = []
    if not hashes["A"] or hashes["A"] != hashes["B"]:
        said = " and ".join(f"{key or 'unknown'} in {side}" for side, key in hashes.items())
        notes.append(
            f"not known to be the same images: data_hash is {said}; joined by key and target alone"
        )
    one, other = _how(first, a), _how(second, b)
    notes += [f"{k}: {one[k]} in A, {other[k]} in B" for k in one if one[k] != other[k]]
    notes += [f"{side}: {note}" for side, (about, _) in sides.items() for note in about["notes"]]
    return compare_by_sample(ours, theirs) | {"data_hash": hashes, "notes": notes}


def _read(side: str, run: RunDir, name: str, other: RunDir) -> tuple[dict[str, Any], BySample]:
    """An evaluation and its outcomes. ValueError, in a line with the remedy, without them: what the
    `other` run was evaluated on, where this one was not."""
    folder = run.evaluations / name
    if (folder / SCORES).is_file() and not (folder / EVALUATION).is_file():
        raise ValueError(f"{side} learns numbers or shares, and these comparisons are of labels")
    if not (folder / EVALUATION).is_file():
        theirs = None
        with suppress(OSError, ValueError):
            theirs = read_evaluation(other.evaluations / name)["source"]
        raise ValueError(f"{side} has no such evaluation; {_remedy(run, name, theirs)} makes one")
    about: dict[str, Any] = {}
    try:
        about = read_evaluation(folder)
        if about["outcomes_sha256"] is None:
            raise ValueError("no outcomes by sample were kept with it")
        return about, read_outcomes(folder, about["outcomes_sha256"])
    except (OSError, ValueError) as error:
        where = f"{error.filename or folder}: " if isinstance(error, OSError) else ""
        remedy = _remedy(run, name, about.get("source"))
        said = f"of {side}: {where}{reason_of(error)}; {remedy} writes them"
        raise ValueError(said) from None


def _remedy(run: RunDir, name: str, source: str | None = None) -> str:
    """The command that evaluates once more; `source` as an evaluation says it."""
    words = ["bigbatch", "evaluate", str(run.path)]
    if source is None or source.rstrip("/") == f"{run.recipe().data.path.rstrip('/')}/{name}":
        words += ["--split", name]
    else:
        words += ["--data", source]
        if Path(source).name != name:
            words += ["--out", str(run.evaluations / name)]
    return f"`{shlex.join(words)}`"


def _how(about: dict[str, Any], run: RunDir) -> dict[str, Any]:
    """What was done with the images, and by which members: the run's own name is not of it."""
    names = [name.removeprefix(f"{run.name}/") for name in about["member_names"]]
    return {key: about[key] for key in _HOW} | {"members": ", ".join(names)}


def in_words(found: list[dict[str, Any]]) -> list[str]:
    """A line for each evaluation, and what a reader should know of it."""
    if not found:
        return ["evaluations: none of either run"]
    lines = []
    for one in found:
        if one["problem"] is not None:
            lines.append(f"evaluation {one['name']}: not compared: {one['problem']}")
            continue
        accuracy, nll, counts = one["accuracy"], one["nll"], one["mcnemar"]
        low, high = (100 * end for end in accuracy["interval"])
        samples = one["samples"]
        lines += [
            f"evaluation {one['name']}: B minus A over {samples['both']:,} samples, 95 % each:",
            f"  accuracy {accuracy['A']:.2%} in A, {accuracy['B']:.2%} in B: "
            f"{100 * accuracy['difference']:+.2f} points ({low:+.2f} to {high:+.2f})",
            f"  nll {nll['A']:.4f} in A, {nll['B']:.4f} in B: {nll['difference']:+.4f} "
            f"({nll['interval'][0]:+.4f} to {nll['interval'][1]:+.4f})",
            f"  right in A alone: {counts['only_A']:,}, in B alone: {counts['only_B']:,}; "
            f"McNemar's p = {counts['p_value']:.2g}",
        ]
        if samples["A"] or samples["B"]:
            lines.append(
                f"  left out, since the other has no such key: {samples['A']:,} of A, "
                f"{samples['B']:,} of B"
            )
        lines += [f"  note: {note}" for note in one["notes"]]
    return lines
