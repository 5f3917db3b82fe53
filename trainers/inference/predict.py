"""Predictions for every image of a source, each exactly once, on any number of ranks."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigbatch.configs.targets import learns_numbers
from bigbatch.data.listing import Listing
from bigbatch.data.order import Positions
from bigbatch.data.targets import Targets
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.evaluation.metrics import Probabilities
from bigbatch.trainers.inference.forward import Forward, Outputs
from bigbatch.trainers.inference.progress import Progress
from bigbatch.trainers.inference.rows import NumberTable, Part, Table, join
from bigbatch.trainers.inference.targets import predicted_numbers


def predict(
    engine: Engine,
    ensemble: Ensemble,
    forward: Forward,
    listing: Listing,
    out: Path,
    *,
    features: bool = False,
    predictions: bool = True,
) -> dict[str, Any] | None:
    """Write a row for every image of `listing` to `out`, in its order; collective.

    `features` and `predictions` say which columns (`Table`). Returns what was written, on rank 0.
    An image that cannot be read is a row with a reason.
    """
    started = time.perf_counter()
    members = [member.name for member in ensemble.members]
    about = {
        "members": members,
        "combination": ensemble.combination.to_json(),
        "tta": forward.tta,
        "mc_dropout": forward.mc_dropout,
    }
    numbers = predictions and learns_numbers(ensemble.members[0].recipe)
    table: Table | NumberTable
    if numbers:
        table = NumberTable(ensemble.classes, about, features=features)
    else:
        table = Table(
            ensemble.classes,
            ensemble.combination,
            about,
            features=features,
            predictions=predictions,
        )
    folder = Path(engine.from_main(str(out.with_name(f".{out.name}.parts-{time.time_ns()}"))))
    engine.on_main(folder.mkdir)
    try:
        part = Part(folder, engine.rank, table.schema)
        counts = np.zeros(3)  # unreadable, with a target, right; of numbers the sum of errors
        with Progress("predicting", len(listing.index), engine) as progress:
            for outputs in forward.outputs(listing.index, leave_out_bad=True):
                if numbers:
                    answers = predicted_numbers(ensemble.members, outputs.logits)
                else:
                    answers = ensemble.combination.apply(outputs.logits)
                part.write(_rows(table, listing, outputs, answers))
                counts += (_errors if numbers else _count)(listing, outputs, answers)
                progress.advance(len(outputs.samples) + len(outputs.bad))
        part.close()
        engine.barrier()  # all parts are whole

        def joined() -> int:
            batches = -(-len(listing.index) // forward.batch)
            reasons = [reason for _, reason in listing.unreadable]
            keys = [key for key, _ in listing.unreadable]
            nothing = np.zeros((0, len(ensemble.classes)))
            none = np.zeros((0, 0), np.float32) if features else None
            unknown: Sequence[Any] = [None if numbers else -1] * len(keys)
            last = table.rows(keys, unknown, nothing, reasons, none)
            return join(folder, engine.world, batches, last, out, len(ensemble.classes))

        rows = engine.on_main(joined)
    finally:  # on each rank: rank 0 may be the one that was killed
        shutil.rmtree(folder, ignore_errors=True)
    totals = engine.sum_by_name({"counts": torch.from_numpy(counts)})["counts"].tolist()
    if engine.rank != 0:
        return None
    unreadable, known = (int(value) for value in totals[:2])
    judged: dict[str, Any] = {"accuracy": totals[2] / known if known and predictions else None}
    if numbers:
        judged = {"accuracy": None, "mae": totals[2] / known if known else None}
    seconds = time.perf_counter() - started
    return {
        "out": str(out),
        "rows": rows,
        "unreadable": unreadable + len(listing.unreadable),
        "with_target": known,
        **judged,
        "members": members,
        "seconds": round(seconds, 2),
        "images_per_s": round(len(listing.index) / seconds, 1),
        "notes": listing.notes,
    }


def _rows(
    table: Table | NumberTable, listing: Listing, outputs: Outputs, answers: Probabilities
) -> Any:
    """The rows of a batch, in the order of its samples, the unreadable ones among them."""
    reasons: dict[int, str | None] = dict.fromkeys(outputs.samples.tolist())
    reasons |= dict(outputs.bad)
    samples = sorted(reasons)
    known: Sequence[Any] = listing.index.label[samples].tolist()
    if isinstance(table, NumberTable):
        true = _targets(listing, np.array(samples, np.int64), answers.shape[1])
        known = [None] * len(samples) if true is None else list(true)
    return table.rows(
        [listing.keys[sample] for sample in samples],
        known,
        answers,
        [reasons[sample] for sample in samples],
        outputs.features,
    )


def _targets(listing: Listing, samples: Positions, width: int) -> Targets | None:
    """What is true of samples [n, K]; None where nobody says, or it is of other numbers."""
    target = listing.index.target
    return None if target is None or target.shape[1] != width else target[samples]


def _errors(listing: Listing, outputs: Outputs, predicted: Probabilities) -> Any:
    true = _targets(listing, outputs.samples, predicted.shape[1])
    if true is None:
        return np.array([len(outputs.bad), 0, 0.0])
    error = np.abs(predicted - true).mean(1).sum()
    return np.array([len(outputs.bad), len(true), error])


def _count(listing: Listing, outputs: Outputs, probabilities: Probabilities) -> Any:
    labels = listing.index.label[outputs.samples]
    known = labels >= 0
    right = (probabilities.argmax(axis=1) == labels) & known
    return np.array([len(outputs.bad), known.sum(), right.sum()], np.float64)
