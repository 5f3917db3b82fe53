"""Members scored, selected and combined: a mean of probabilities, and a soup of weights."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bigbatch.configs.ensemble import Ensemble
from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json, write_atomically
from bigbatch.configs.rundir import RunDir
from bigbatch.data.index import Index
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.ensemble.combination import Logits
from bigbatch.trainers.ensemble.evaluations import about, statistics_of
from bigbatch.trainers.ensemble.folder import open_ensemble
from bigbatch.trainers.ensemble.members import MEMBERS
from bigbatch.trainers.ensemble.selection import within_margin
from bigbatch.trainers.ensemble.soup import SOUP, SoupStep, greedy_soup
from bigbatch.trainers.evaluation.accuracy import confusion_pairs
from bigbatch.trainers.evaluation.evaluate import Evaluator
from bigbatch.trainers.evaluation.metrics import Labels, score, softmax
from bigbatch.trainers.evaluation.record import write_evaluation
from bigbatch.trainers.models.weights_file import describe
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
    labels = {name: np.asarray(index.label, np.int64) for name, index in splits.items()}
    found: dict[str, list[np.ndarray]] = {name: [] for name in splits}
    weights = [load_weights(model, path / MODEL) for path in paths]
    for name, index in splits.items():
        found[name] = evaluator.logits_of(model, index, weights) or []

    members: dict[str, list[dict[str, Any]]] = {name: [] for name in splits}
    kept: list[int] = []
    if engine.rank == 0:
        for name in splits:
            for path, logits in zip(paths, found[name], strict=True):
                members[name].append({"name": path.name, **score(softmax(logits), labels[name])})
        accuracies = [m["accuracy"] for m in members[val]]
        kept = within_margin(accuracies, config.selection_margin)
        for name in splits:
            for number, member in enumerate(members[name]):
                member["kept"] = number in kept
        # Best first, the order in which a greedy soup tries its ingredients.
        kept.sort(key=lambda i: (-accuracies[i], i))
    kept, losses = engine.from_main((kept, [members[val][i]["nll"] for i in kept]))

    steps: list[SoupStep] = []
    soup_scores: dict[str, dict[str, float]] = {}
    if config.soup and len(kept) > 1:
        steps = greedy_soup(
            {paths[i].name: paths[i] / MODEL for i in kept},
            losses,
            model,
            engine,
            lambda: _score(evaluator.logits(model, splits[val]), labels[val]),
            recompute,
        )
        for name, index in splits.items():
            scores = _score(evaluator.logits(model, index), labels[name])
            if scores is not None:
                soup_scores[name] = scores
    if engine.rank != 0:
        return None

    run.ensemble.mkdir(exist_ok=True)
    if soup_scores:
        info = describe(run.recipe(), splits[val].classes)
        save_weights(model, run.ensemble / SOUP, info)
    together = sorted(kept)
    content = {
        "kept": [paths[i].name for i in together],
        "soup": [step.name for step in steps if step.kept],
        "soup_steps": [asdict(step) for step in steps],
    }
    write_atomically(run.ensemble / MEMBERS, to_json(content, indent=1))
    means = {n: _mean_probabilities([found[n][i] for i in together]) for n in splits}
    result: dict[str, dict[str, Any]] = {}
    for name in splits:
        result[name] = {"members": members[name], "ensemble": score(means[name], labels[name])}
        if soup_scores:
            result[name]["soup"] = soup_scores[name]
        if all(np.isfinite(found[name][i]).all() for i in together):
            best = None if name == val else f"{run.name}/{paths[kept[0]].name}"
            kept_logits = np.stack([found[name][i] for i in together])
            _write_evaluation(run, splits[name], kept_logits, labels[name], best)
    last = others[-1] if others else val
    classes = splits[last].classes
    pairs = confusion_pairs(labels[last], means[last].argmax(axis=1), len(classes)).tolist()
    table = {"split": last, "classes": list(classes), "pairs": pairs}
    write_atomically(run.ensemble / "confusion.json", to_json(table))
    return result


def _write_evaluation(
    run: RunDir, index: Index, logits: Logits, labels: Labels, best: str | None
) -> None:
    """Write what `bigbatch evaluate` would of the kept members' logits [M, N, C]."""
    ensemble = open_ensemble([run.path])
    notes = ["members were chosen on this split"] if best is None else []
    content = about(ensemble, [run.path], index, notes)
    content |= statistics_of(ensemble, logits, labels, best=best)
    write_evaluation(run.evaluations / index.place.rstrip("/").rpartition("/")[2], content)


def _mean_probabilities(logits: Sequence[Logits]) -> np.ndarray:
    """np.mean of the members' probabilities [N, C], bit for bit, two of them at a time."""
    total = softmax(logits[0])
    for each in logits[1:]:
        total += softmax(each)
    return total / len(logits)


def _score(logits: np.ndarray | None, labels: np.ndarray) -> dict[str, float] | None:
    return None if logits is None else score(softmax(logits), labels)
