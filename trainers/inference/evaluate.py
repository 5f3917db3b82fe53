"""How good members and their ensemble are on a split: figures, and the worst mistakes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.configs.errors import UserError
from bigbatch.data.augment.crop import crop_resize
from bigbatch.data.batch import Decoding
from bigbatch.data.geometry import View, into_frames
from bigbatch.data.index import Index
from bigbatch.data.listing import Listing, open_listing
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.ensemble.combination import Logits
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.evaluation.metrics import Labels, Probabilities, score, softmax
from bigbatch.trainers.inference.forward import Forward

_WORST = 24  # mistakes that are drawn


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


def evaluate(
    ensemble: Ensemble, forward: Forward, listing: Listing
) -> tuple[Logits, Probabilities] | None:
    """Logits [M, N, C] of the members and probabilities [N, C] of the ensemble, on rank 0."""
    logits = forward.logits(listing.index)
    return None if logits is None else (logits, ensemble.combination.apply(logits))


def figures(
    ensemble: Ensemble, logits: Logits, probabilities: Probabilities, labels: Labels
) -> dict[str, Any]:
    """Scores of each member and of the ensemble, ready for JSON."""
    members = [
        {"name": member.name, **score(softmax(own), labels)}
        for member, own in zip(ensemble.members, logits, strict=True)
    ]
    return {
        "samples": len(labels),
        "members": members,
        "ensemble": score(probabilities, labels),
        "combination": ensemble.combination.method,
    }


def draw_worst(
    ensemble: Ensemble,
    listing: Listing,
    probabilities: Probabilities,
    labels: Labels,
    path: Path,
) -> int:
    """Draw the mistakes that were made with most confidence, as the first member sees them.

    Returns how many mistakes there are; none makes no picture.
    """
    best = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(best != labels)
    confidence = probabilities[wrong, best[wrong]]
    chosen = wrong[np.lexsort((wrong, -confidence))][:_WORST]
    if not len(chosen):
        return 0
    from matplotlib.figure import Figure

    images = _look(ensemble, listing.index, chosen)
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.0 * columns, 2.35 * rows), layout="constrained")
    axes = np.array(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, image, sample in zip(axes, images, chosen.tolist(), strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        said, truth = (ensemble.classes[k] for k in (best[sample], labels[sample]))
        p = probabilities[sample, best[sample]]
        title = f"{_short(said)} {p:.0%}\nis {_short(truth)}"
        axis.set_title(title, fontsize=8, parse_math=False)
    figure.savefig(path, dpi=110, format="png")
    return len(wrong)


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:20]}..."


def _look(ensemble: Ensemble, index: Index, samples: np.ndarray) -> list[np.ndarray]:
    """What the first member sees of samples: arrays [H, W] or [H, W, 3] in [0, 1]."""
    from bigbatch.data.loader import eval_batches

    recipe = ensemble.members[0].recipe
    view = View(recipe.data.image_size, recipe.evaluate.crop_fraction)
    columns = ("shard", "offset", "size", "label", "crc")
    few = replace(index, **{name: getattr(index, name)[samples] for name in columns})
    decoding = Decoding(view.out, recipe.data.channels, workers=0, threads=1, view=view)
    (batch,) = eval_batches(few, decoding, batch=len(samples), rank=0, world=1)
    frames = batch.frames
    sizes = np.stack([frames["full_height"], frames["full_width"]], 1)
    boxes = into_frames(view.boxes(sizes, 0, 0), frames)
    images = crop_resize(batch, boxes, view.out).permute(0, 2, 3, 1).numpy()
    return [image[..., 0] if image.shape[2] == 1 else image for image in images]


def save_evaluation(
    folder: Path,
    ensemble: Ensemble,
    listing: Listing,
    result: dict[str, Any],
    probabilities: Probabilities,
    labels: Labels,
) -> None:
    """Write the figures and the picture of the worst mistakes into `folder`."""
    from bigbatch.configs.files import to_json, write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    result["mistakes"] = draw_worst(ensemble, listing, probabilities, labels, folder / "worst.png")
    write_atomically(folder / "evaluation.json", to_json(result, indent=1) + "\n")


def table_of(engine: Engine, result: dict[str, Any]) -> Any:
    """The figures as a table for the terminal."""
    from rich import box
    from rich.table import Table

    from bigbatch.trainers.report.report import figure

    table = Table(box=box.SIMPLE_HEAD, title=None)
    table.add_column("model", no_wrap=True)
    measures = ("accuracy", "nll", "brier", "ece")
    for name in measures:
        table.add_column(name, justify="right", no_wrap=True)
    rows = [(m["name"], m, "") for m in result["members"]]
    if len(rows) > 1:
        rows.append(("ensemble", result["ensemble"], "bold"))
    for name, entry, style in rows:
        table.add_row(name, *(figure(entry, measure) for measure in measures), style=style)
    return table
