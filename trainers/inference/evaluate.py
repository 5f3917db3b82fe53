"""How good members and their ensemble are on a split: figures, and the worst mistakes."""

from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.data.listing import Listing, open_listing
from bigbatch.data.staging import is_url
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.evaluation.by_sample import write_outcomes
from bigbatch.trainers.evaluation.outcomes import Outcomes
from bigbatch.trainers.evaluation.record import WORST, write_evaluation
from bigbatch.trainers.inference.worst import draw_worst

Rows = list[tuple[str, dict[str, Any]]]  # models by name, with their figures


def open_labelled(source: str, classes: tuple[str, ...]) -> Listing:
    """The images of a split, all with a target; UserError where one has none."""
    if not is_url(source) and not Path(source).exists():
        raise UserError(f"no source {source!r} here; name one with --data and --split")
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


def save_evaluation(
    folder: Path,
    ensemble: Ensemble,
    listing: Listing,
    result: dict[str, Any],
    found: Outcomes,
) -> None:
    """Write the figures, `found` by sample, and the picture of its worst mistakes to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WORST).unlink(missing_ok=True)  # of another evaluation
    result["outcomes_sha256"] = write_outcomes(folder, listing.keys, ensemble.classes, found)
    drawn = draw_worst(ensemble, listing, found, folder / WORST)
    result["mistakes_drawn"] = drawn
    write_evaluation(folder, result)


def renew_report(folder: Path) -> Path | None:
    """Write report.html anew where `folder` is in a run that has one; None elsewhere."""
    run = RunDir(folder.parent.parent)
    if folder.parent != run.evaluations or not (run.recipe_file.is_file() and run.report.is_file()):
        return None
    from bigbatch.trainers.report.report import write_report

    return write_report(run)


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
    from rich.text import Text

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
        table.add_row(Text(name), *cells, *missing, style="bold" if name == "ensemble" else "")
    return table
