"""Members scored, selected and combined: a mean of probabilities, and a soup of weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bigbatch.configs.ensemble import Ensemble
from bigbatch.configs.errors import UserError
from bigbatch.configs.files import finite, to_json, write_atomically
from bigbatch.configs.judged import ACCURACY, NLL, Score, judged_by, judged_in
from bigbatch.configs.notices import notice
from bigbatch.configs.rundir import ANSWERS, RunDir
from bigbatch.data.index import Index
from bigbatch.data.order import Positions
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.ensemble.combination import Combination, Logits
from bigbatch.trainers.ensemble.evaluations import EnsembleStatistics, about
from bigbatch.trainers.ensemble.folder import Ensemble as Folder
from bigbatch.trainers.ensemble.folder import open_ensemble
from bigbatch.trainers.ensemble.members import MEMBERS, find_members
from bigbatch.trainers.ensemble.selection import within_margin
from bigbatch.trainers.ensemble.soup import SOUP, SoupStep, greedy_soup
from bigbatch.trainers.evaluation.accuracy import confusion_pairs
from bigbatch.trainers.evaluation.by_sample import OUTCOMES, write_outcomes
from bigbatch.trainers.evaluation.evaluate import (
    Again,
    Evaluator,
    Found,
    gather_outcomes,
    gather_statistics,
    labels_of,
)
from bigbatch.trainers.evaluation.metrics import Probabilities, softmax
from bigbatch.trainers.evaluation.outcomes import (
    Collected,
    Outcomes,
    outcomes_of,
    outcomes_of_rows,
    row_chunks,
)
from bigbatch.trainers.evaluation.record import write_evaluation
from bigbatch.trainers.evaluation.statistics import Statistics
from bigbatch.trainers.evaluation.targets import answers
from bigbatch.trainers.recovery.stored import MODEL, list_snapshots
from bigbatch.trainers.recovery.tensor_files import load_weights, save_weights


def combine(
    run: RunDir,
    config: Ensemble,
    engine: Engine,
    evaluator: Evaluator,
    splits: dict[str, Index],
    snapshots: int,
    *,
    recompute: Callable[[], None],
) -> dict[str, dict[str, Any]] | None:
    """Score every snapshot, select members, and build the ensemble and the soup.

    `splits` holds the validation split first: it alone decides on members and soup; the
    other splits are only reported. `recompute` makes running statistics of the weights that
    `engine.module` then has. Collective; the result, scores by split of members,
    ensemble and soup, is rank 0's, None elsewhere. Raises UserError on all ranks where fewer
    than `snapshots` are there.
    """
    # Rank 0's list: on a network file system another machine may not see the last one yet.
    names = engine.from_main([path.name for path in list_snapshots(run.snapshots)])
    paths = [run.snapshots / name for name in names]
    if len(paths) < snapshots:
        raise UserError(
            f"{run.snapshots} holds {len(paths)} of {snapshots} snapshots; restore the others, or "
            "start a new run"
        )
    model = engine.module
    val, *others = splits
    weights = [load_weights(model, path / MODEL) for path in paths]
    # Of the validation split once to choose members, and once more to combine those.
    share = len(splits[val]) * evaluator.width(splits[val]) // engine.world
    again = Again(lambda: evaluator.batches(model, splits[val], weights), len(paths) * share)
    kept, losses = engine.from_main(
        _best_first(look(evaluator, splits[val], again, len(paths)), config.selection_margin)
    )
    judge = judged_by(run.recipe())
    together = sorted(kept)
    names = [paths[i].name for i in together]
    ensemble = Folder(tuple(find_members(run, ",".join(names))), Combination())
    seen: dict[str, Seen | None] = {}
    for name, index in splits.items():
        batches = again if name == val else evaluator.batches(model, index, weights)
        seen[name] = look(evaluator, index, batches, len(paths), together, ensemble)
    del again

    steps: list[SoupStep] = []
    soup_scores: dict[str, dict[str, float]] = {}
    if config.soup and len(kept) > 1:
        steps = greedy_soup(
            {paths[i].name: paths[i] / MODEL for i in kept},
            losses,
            model,
            engine,
            lambda: _scores(evaluator.outcomes(model, splits[val])),
            recompute,
            judge,
            _loss(judge),
        )
        for name, index in splits.items():
            scores = _scores(evaluator.outcomes(model, index))
            if scores is not None:
                soup_scores[name] = scores
    if engine.rank != 0:
        return None

    run.ensemble.mkdir(exist_ok=True)
    if soup_scores:
        info = ensemble.members[0].info
        save_weights(model, run.ensemble / SOUP, info)
    content = {
        "kept": names,
        "soup": [step.name for step in steps if step.kept],
        "soup_steps": [asdict(step) for step in steps],
    }
    write_atomically(run.ensemble / MEMBERS, to_json(content, indent=1))
    result: dict[str, dict[str, Any]] = {}
    last = others[-1] if others else val
    for name, index in splits.items():
        found = seen[name]
        assert found is not None  # on rank 0
        assert found.mean is not None
        members = [
            {"name": path.name, **own.scores(), "kept": number in kept}
            for number, (path, own) in enumerate(zip(paths, found.members, strict=True))
        ]
        result[name] = {"members": members, "ensemble": found.mean.scores()}
        if soup_scores:
            result[name]["soup"] = soup_scores[name]
        if found.statistics is not None:
            best = None if name == val else f"{run.name}/{paths[kept[0]].name}"
            notes = ["members were chosen on this split"] if best is None else []
            _write_evaluation(run, index, found.statistics, notes, best)
        if name == last:
            _write_answers(run, last, index, found.mean, ensemble.members[0].classes)
    return result


def _write_answers(
    run: RunDir, split: str, index: Index, mean: Found, outputs: Sequence[str]
) -> None:
    """What the ensemble answered, for the report: confused classes, or numbers beside true ones."""
    if isinstance(mean, Outcomes):
        classes = index.classes
        pairs = confusion_pairs(mean.label, mean.predicted, len(classes)).tolist()
        table = {"split": split, "classes": list(classes), "pairs": pairs}
        write_atomically(run.ensemble / "confusion.json", to_json(table))
        return
    write_atomically(run.ensemble / ANSWERS, to_json(finite(answers(split, outputs, mean))))


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of a split, of all samples."""

    members: list[Found]
    mean: Found | None  # of the kept members' mean probability, or mean number
    statistics: Statistics | None  # of the kept members; None where a logit is not finite


def look(
    evaluator: Evaluator,
    index: Index,
    batches: Iterable[tuple[Positions, Logits]],
    members: int,
    kept: Sequence[int] = (),
    ensemble: Folder | None = None,
) -> Seen | None:
    """Go once through `Evaluator.batches` of a split; on rank 0 what was seen. Collective.

    `ensemble` is that of the `kept` members. No more than a batch's logits are held.
    """
    if evaluator.scaling is not None:
        return _look_at_targets(
            evaluator, index, batches, members, None if ensemble is None else kept
        )
    each = [Collected() for _ in range(members)]
    means = Collected()
    statistics = None if ensemble is None else EnsembleStatistics(ensemble)
    finite = True
    for samples, logits in batches:
        labels = labels_of(index, samples)
        for own, member in zip(each, logits, strict=True):
            own.add(outcomes_of(member, labels))
        if statistics is None:
            continue
        for rows in row_chunks(len(labels), logits.shape[2]):
            chosen = np.stack([logits[member, rows] for member in kept])
            means.add(outcomes_of_rows(_mean_probabilities(chosen), labels[rows]))
            finite = finite and bool(np.isfinite(chosen).all())
            if finite:
                statistics.add(chosen, labels[rows])
    engine, count, batch = evaluator.engine, len(index), evaluator.batch_of(index)
    found = [gather_outcomes(engine, own.whole(), count, batch) for own in each]
    mean = whole = None
    if statistics is not None:
        mean = gather_outcomes(engine, means.whole(), count, batch)
    if statistics is not None and all(engine.gather_values(finite)):
        whole = gather_statistics(engine, statistics.statistics, count, batch)
    if engine.rank != 0:
        return None
    return Seen([own for own in found if own is not None], mean, whole)


def _look_at_targets(
    evaluator: Evaluator,
    index: Index,
    batches: Iterable[tuple[Positions, Logits]],
    members: int,
    kept: Sequence[int] | None,
) -> Seen | None:
    """The same of what learned numbers or shares of classes; their mean where some are `kept`."""
    each: list[list[Found]] = [[] for _ in range(members)]
    means: list[Found] = []
    for samples, outputs in batches:
        for own, member in zip(each, outputs, strict=True):
            own.append(evaluator.judged(member, index, samples))
        if kept is not None:
            means.append(evaluator.mean_judged(outputs[list(kept)], index, samples))
    found = [evaluator.gather(own, index) for own in each]
    mean = None if kept is None else evaluator.gather(means, index)
    if evaluator.engine.rank != 0:
        return None
    return Seen([own for own in found if own is not None], mean, None)


def _best_first(seen: Seen | None, margin: float) -> tuple[list[int], list[float]]:
    """The members to keep, and their loss, in the order in which a greedy soup tries them."""
    if seen is None:
        return [], []
    scores = [own.scores() for own in seen.members]
    judge = judged_in(scores[0]) or ACCURACY
    near = within_margin([score[judge.key] for score in scores], margin, judge)
    kept = sorted(near, key=lambda i: (-judge.merit(scores[i]), i))
    return kept, [scores[i][_loss(judge).key] for i in kept]


def _loss(judge: Score) -> Score:
    """What a barrier between two models is measured in."""
    return NLL if judge == ACCURACY else judge


def write_alone(run: RunDir, splits: Mapping[str, Index], seen: Mapping[str, "Seen"]) -> None:
    """Write evaluations and answers of the one model that a run keeps in place of its snapshots.

    `seen` by name of a split, as `look` gives it. UserError where a logit is not finite.
    """
    for name, index in splits.items():
        found = seen[name]
        if found.statistics is None:
            raise UserError(
                f"the model that {run.path} keeps gives logits that are not finite on {name}; "
                "train it at a lower rate"
            )
        _write_evaluation(run, index, found.statistics)
    assert found.mean is not None
    _write_answers(run, name, index, found.mean, index.classes)


def _write_evaluation(
    run: RunDir, index: Index, found: Statistics, notes: Sequence[str] = (), best: str | None = None
) -> None:
    """Write what `bigbatch evaluate` would of the kept members."""
    content = about(open_ensemble([run.path]), [run.path], index, notes)
    content |= found.summary(best)
    folder = run.evaluations / index.place.rstrip("/").rpartition("/")[2]
    try:
        keys = index.keys()
    except UserError as error:  # training needs none: all else of it stands
        notice(f"no {OUTCOMES} in {folder}: {error}")
    else:
        classes, own = index.classes, found.outcomes()[0]
        content["outcomes_sha256"] = write_outcomes(folder, keys, classes, own)
    write_evaluation(folder, content)


def _mean_probabilities(logits: Logits) -> Probabilities:
    """np.mean of the members' probabilities [N, C], bit for bit, two of them at a time."""
    total = softmax(logits[0])
    for each in logits[1:]:
        total += softmax(each)
    return total / len(logits)


def _scores(found: Found | None) -> dict[str, float] | None:
    return None if found is None else found.scores()
