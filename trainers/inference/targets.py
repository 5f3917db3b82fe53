"""What members that learn numbers, or shares of classes, say of the images of a source."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import finite, to_json, write_atomically
from bigbatch.configs.judged import judged_by, judged_in, shown
from bigbatch.configs.rundir import ANSWERS
from bigbatch.configs.targets import learns_numbers, learns_targets
from bigbatch.configs.words import plural
from bigbatch.data.classes import UNLABELLED
from bigbatch.data.index import Index
from bigbatch.data.listing import open_listing
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.ensemble.evaluations import about
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.evaluation.evaluate import gather_targets, kind_of
from bigbatch.trainers.evaluation.record import SCORES
from bigbatch.trainers.evaluation.targets import (
    Numbers,
    TargetOutcomes,
    answers,
    distributions_of,
    log_softmax,
    mean_distributions_of,
    numbers_of,
)
from bigbatch.trainers.inference.agreement import require_same_images
from bigbatch.trainers.inference.forward import Forward
from bigbatch.trainers.inference.progress import Progress
from bigbatch.trainers.models.weights_file import unlike

_MOST_ROWS = 50  # targets in the table


def answers_targets(ensemble: Ensemble) -> bool:
    """Whether members answer with numbers or shares. UserError where some do, or otherwise."""
    kinds = {learns_targets(m.recipe) and judged_by(m.recipe).key: m for m in ensemble.members}
    if len(kinds) > 1:
        one, other, *_ = kinds.values()
        raise UserError(
            f"member {one.name} has loss {one.recipe.loss.name}, {other.name} "
            f"{other.recipe.loss.name}: their answers are of different kinds; choose members with "
            "--members"
        )
    return False not in kinds


def classes_of(ensemble: Ensemble) -> tuple[str, ...]:
    """By whose names the labels of a source go: those of numbers do not matter."""
    return UNLABELLED if learns_numbers(ensemble.members[0].recipe) else ensemble.classes


def evaluate(
    options: argparse.Namespace, engine: Engine, ensemble: Ensemble, forward: Forward
) -> int:
    """`bigbatch evaluate` of members that learn targets: each image once, on any world size."""
    listing = open_listing(options.source, classes_of(ensemble))
    require_same_images(engine, options.source, listing)
    index = _with_targets(listing.index, ensemble, options.source)
    started = time.perf_counter()
    found = outcomes(engine, ensemble.members, forward, index)
    if found is None:
        return 0
    result = about(ensemble, options.model, index)
    result |= {"tta": options.tta, "mc_dropout": options.mc_dropout, "samples": len(index)}
    *members, mean = found
    names = [member.name for member in ensemble.members]
    result |= {"outputs": list(ensemble.classes), **mean.scores(), "by_target": mean.by_target()}
    if len(names) > 1:
        each = zip(names, members, strict=True)
        result["members"] = [{"name": name, **own.scores()} for name, own in each]
    result["seconds"] = round(time.perf_counter() - started, 2)
    result = finite(result)
    if options.out is not None:
        save(options.out, result, mean)
    if options.json:
        print(to_json(result, indent=1))
        return 0
    _say(result, names)
    if options.out is not None:
        print(f"figures  {options.out / SCORES}")
    return 0


def _with_targets(index: Index, ensemble: Ensemble, source: str) -> Index:
    """`index`; UserError where it lacks what is to be compared."""
    if index.target is None:
        raise UserError(
            f"{source} has no targets to compare with; give shards that have them, or index tars "
            "by `bigbatch index` (`bigbatch predict` needs none)"
        )
    numbers = learns_numbers(ensemble.members[0].recipe)
    if not numbers and (how := unlike(index.classes, ensemble.classes, "the members")):
        raise UserError(f"{source} has {how}; give shards with the same classes.txt")
    if index.target.shape[1] != len(ensemble.classes):
        raise UserError(
            f"{source} has targets of {index.target.shape[1]:,} numbers, the members give "
            f"{len(ensemble.classes):,}; give shards of the same targets"
        )
    return index


def outcomes(
    engine: Engine, members: Sequence[Member], forward: Forward, index: Index
) -> list[TargetOutcomes] | None:
    """Those of each member, and of their mean, over all samples in order, on rank 0. Collective."""
    parts: list[list[TargetOutcomes]] = [[] for _ in range(len(members) + 1)]
    assert index.target is not None
    with Progress("evaluating", len(index), engine) as progress:
        for outputs in forward.outputs(index):
            true = index.target[outputs.samples]
            for own, member, rows in zip(parts, members, outputs.logits, strict=False):
                own.append(_judged(member, rows, true))
            parts[-1].append(mean_of(members, outputs.logits, true))
            progress.advance(len(outputs.samples))
    kind = kind_of(members[0].recipe)
    found = [gather_targets(engine, kind, own, index, forward.batch) for own in parts]
    return [each for each in found if each is not None] or None


def _judged(
    member: Member, outputs: npt.NDArray[np.floating], true: npt.NDArray[np.floating]
) -> TargetOutcomes:
    if learns_numbers(member.recipe):
        return numbers_of(outputs, true, member.recipe.loss.scaling)  # type: ignore[union-attr]
    return distributions_of(log_softmax(outputs), true)


def mean_of(
    members: Sequence[Member],
    outputs: npt.NDArray[np.floating],
    true: npt.NDArray[np.floating],
) -> TargetOutcomes:
    """Outcomes of the mean of the members' numbers, or of their shares, from [M, n, K]."""
    if learns_numbers(members[0].recipe):
        return Numbers(predicted_numbers(members, outputs), true.astype(np.float64))
    return mean_distributions_of(outputs, true)


def predicted_numbers(
    members: Sequence[Member], outputs: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """The mean of the members' numbers in the targets' unit, [n, K], of outputs [M, n, K]."""
    total = np.zeros(outputs.shape[1:])
    for member, own in zip(members, outputs, strict=True):
        mean, std = (np.array(x) for x in member.recipe.loss.scaling)  # type: ignore[union-attr]
        total += own.astype(np.float64) * std + mean
    return total / len(outputs)


def save(folder: Path, result: dict[str, Any], mean: TargetOutcomes) -> None:
    """Write the scores, and numbers beside true ones; UserError where the disk refuses."""
    content = to_json(finite(answers(folder.name, result["outputs"], mean)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SCORES, to_json(result, indent=1) + "\n")
        write_atomically(folder / ANSWERS, content)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; choose another --out") from None


def _say(result: dict[str, Any], names: Sequence[str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from bigbatch.configs.terminal import Terminal

    judge = judged_in(result)
    assert judge is not None
    scores = shown(judge)
    console = Terminal(soft_wrap=True)
    rows = [*result.get("members", []), {"name": "ensemble" if "members" in result else names[0]}]
    rows[-1] = result | rows[-1]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    for score in scores:
        table.add_column(score.title, justify="right")
    for row in rows:
        texts = ["-" if row[s.key] is None else s.text(row[s.key]) for s in scores]
        table.add_row(Text(str(row["name"])), *texts)
    console.print(table)
    each = result["by_target"]
    if each and len(result["outputs"]) > 1:
        by_target = Table("target", *(s.title for s in scores), box=box.SIMPLE_HEAD)
        for k, name in enumerate(result["outputs"][:_MOST_ROWS]):
            values = [each[s.key][k] for s in scores]
            texts = ["-" if v is None else s.text(v) for s, v in zip(scores, values, strict=True)]
            by_target.add_row(Text(name), *texts)
        console.print(by_target)
    print(f"{plural(result['samples'], 'image')} of {result['source']}")
