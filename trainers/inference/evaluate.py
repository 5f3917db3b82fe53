"""How good members and their ensemble are on a split: figures, and the worst mistakes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json, write_atomically
from bigbatch.data.listing import Listing, open_listing
from bigbatch.trainers.ensemble.combination import Logits
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.evaluation.conformal import ConformalSets
from bigbatch.trainers.evaluation.metrics import Labels, Probabilities, softmax
from bigbatch.trainers.evaluation.outcomes import row_chunks
from bigbatch.trainers.evaluation.statistics import Statistics
from bigbatch.trainers.inference.worst import draw_worst

Rows = list[tuple[str, dict[str, Any]]]  # models by name, with their figures


def open_labelled(source: str, classes: tuple[str, ...]) -> Listing:
    """The images of a split, all with a target; UserError where one has none."""
    listing = open_listing(source, classes)
    unknown = int((listing.index.label < 0).sum())
    if unknown:
        raise UserError(
            f"{source}: {unknown:,} of {len(listing.index):,} images have no target among the "
            f"model's {len(classes):,} classes{_reason(listing)}; label them, or use "
            "`bigbatch predict`, which needs no targets"
        )
    if listing.unreadable:
        where, why = listing.unreadable[0]
        raise UserError(f"{source}: {where}: {why}; mend the archive, or index it with --skip-bad")
    return listing


def _reason(listing: Listing) -> str:
    return f" ({listing.notes[-1]})" if listing.notes else ""


def statistics_of(
    ensemble: Ensemble,
    logits: Logits,
    labels: Labels,
    *,
    best: str | None = None,
    sets: Sequence[ConformalSets] = (),
) -> dict[str, Any]:
    """What docs/statistics.md lists, of the ensemble and its members' logits [M, N, C].

    `best` is the member that did best on other samples, `sets` were fitted on other samples.
    """
    members = [member.name for member in ensemble.members] if len(logits) > 1 else []
    combination = ensemble.combination
    plain = replace(combination, temperature=1.0)
    statistics = Statistics(
        len(ensemble.classes),
        members=members,
        temperature=combination.temperature,
        sets=sets,
        reject_below=combination.reject_below,
    )
    for rows in row_chunks(len(labels), logits.shape[0] * logits.shape[2]):
        own = logits[:, rows]
        each = np.stack([softmax(member) for member in own]) if members else None
        statistics.add(labels[rows], plain.apply(own), each)
    return statistics.summary(best)


def save_evaluation(
    folder: Path,
    ensemble: Ensemble,
    listing: Listing,
    result: dict[str, Any],
    probabilities: Probabilities,
    labels: Labels,
) -> None:
    """Write the figures and the picture of the worst mistakes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    result["mistakes_drawn"] = draw_worst(
        ensemble, listing, probabilities, labels, folder / "worst.png"
    )
    write_atomically(folder / "evaluation.json", to_json(result, indent=1) + "\n")


def rows_of(statistics: dict[str, Any], name: str) -> Rows:
    """The models that statistics are of, the ensemble last; a member alone is called `name`."""
    members = statistics.get("members")
    if members is None:
        return [(name, statistics)]
    return [*((m["name"], m) for m in members["each"]), ("ensemble", statistics)]


def table_of(splits: dict[str, Rows]) -> Any:
    """Rows of figures by split, as a table for the terminal: 80 columns hold two splits."""
    from rich import box
    from rich.table import Table

    titles = ["accuracy", "95 %", "nll", "ece"] if len(splits) == 1 else ["accuracy", "nll", "ece"]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("\nmodel", no_wrap=True)
    found: dict[str, list[str]] = {}
    for number, (split, rows) in enumerate(splits.items()):
        for title in titles:
            table.add_column(f"{split}\n{title}", justify="right", no_wrap=True)
        for name, entry in rows:
            low, high = entry["accuracy_interval"]
            texts = {"95 %": f"{low:.1%} - {high:.1%}", "accuracy": f"{entry['accuracy']:.2%}"}
            cells = found.setdefault(name, ["-"] * len(titles) * number)
            cells += [texts.get(title) or f"{entry[title]:.4f}" for title in titles]
    for name, cells in found.items():
        missing = ["-"] * (len(titles) * len(splits) - len(cells))
        table.add_row(name, *cells, *missing, style="bold" if name == "ensemble" else "")
    return table


def said_of_pair(statistics: dict[str, Any]) -> str:
    """The comparison of the ensemble with its best member, in a line; "" without members."""
    if statistics["members"] is None:
        return ""
    against = statistics["members"]["against_best"]
    accuracy, mcnemar = against["accuracy"], against["mcnemar"]
    low, high = accuracy["interval"]
    p = mcnemar["p_value"]
    return (
        f"ensemble minus {against['best']}: {100 * accuracy['difference']:+.2f} points of accuracy "
        f"(95 %: {100 * low:+.2f} to {100 * high:+.2f}; McNemar p = {p:.2g}), "
        f"{against['nll']['difference']:+.4f} nll"
    )
