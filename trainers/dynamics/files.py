"""What was found of a run's samples as files: a page, pictures, a table, weights. Free of torch."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json, write_atomically
from bigbatch.configs.plot_style import BLUE, MUTED, ORANGE, plot_style
from bigbatch.data.decode import decode
from bigbatch.data.decode_batch import Source
from bigbatch.data.read import BadSample
from bigbatch.data.rng import uniforms
from bigbatch.trainers.dynamics.look import COLUMNS, Looked, in_words
from bigbatch.trainers.dynamics.study import Dynamics
from bigbatch.trainers.report import pages
from bigbatch.trainers.report.grid import grid

RESULT, PAGE, TABLE, ERRORS, MAP = (
    "samples.json",
    "samples.html",
    "samples.parquet",  # a row for each sample
    "label-errors.png",
    "data-map.png",
)
_PICTURES = 48
_SIDE = 256  # pixels, to which an image is decoded at least, where it has as many
_DOTS = 20_000  # of a data map: more are one blot
_NO_IMAGE = np.full((8, 8, 3), 230, np.uint8)


def write_folder(folder: Path, looked: Looked, summary: dict[str, Any]) -> None:
    """Write all of it below a new `folder`. Raises OSError."""
    folder.mkdir(parents=True)
    write_atomically(folder / RESULT, to_json(summary, indent=1) + "\n")
    _write_table(folder / TABLE, looked)
    write_atomically(folder / ERRORS, errors_picture(looked))
    draw_map(looked.found, folder / MAP)
    write_atomically(folder / PAGE, _page(looked, summary))


def _write_table(path: Path, looked: Looked) -> None:
    found, index = looked.found, looked.index
    columns: dict[str, Any] = {"key": looked.keys}
    columns["class"] = [index.classes[label] for label in index.label.tolist()]
    rank = np.full(len(index), 0, np.int64)
    ranking = found.ranking()
    rank[ranking] = np.arange(1, len(ranking) + 1)
    columns["rank"] = pa.array(rank, mask=rank == 0)
    for name in COLUMNS:
        values = getattr(found, name)
        columns[name] = pa.array(values, mask=~found.seen & (name != "visits"))
    pq.write_table(pa.table(columns), path)


def write_weights(path: Path, looked: Looked, weights: npt.NDArray[np.float64]) -> None:
    """Weights [N] as data.sampling weights reads them: Parquet, or CSV by the name's end."""
    if not weights.any():
        raise UserError(
            "all of these weights are 0, and a run would draw nothing; choose another --weigh, or "
            "a smaller --drop"
        )
    table = pa.table({"key": looked.keys, "weight": weights})
    try:
        content = io.BytesIO()
        csv.write_csv(table, content) if path.suffix == ".csv" else pq.write_table(table, content)
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


def errors_picture(looked: Looked) -> bytes:
    """The most probable label errors as PNG: key, class and mean margin above each image."""
    index, channels = looked.index, looked.recipe.data.channels
    chosen = looked.found.ranking()[:_PICTURES]
    names = [shard.name for shard in index.shards]
    source = Source(index.root, names, _SIDE, channels, 1, index.remote, loose=index.loose)
    reader = source.reader()
    images = []
    for i in chosen.tolist():
        place = (int(getattr(index, name)[i]) for name in ("shard", "offset", "size", "crc"))
        try:
            image = decode(reader.read(*place), image_size=_SIDE, channels=channels)
        except BadSample:
            image = _NO_IMAGE
        images.append(image[..., 0] if image.shape[2] == 1 else image)
    lines = [
        (f"{row['key']}: {row['class']}", f"margin {row['margin']:.1f}, {row['right']:.0%} right")
        for row in looked.rows(chosen)
    ]
    content = io.BytesIO()
    grid(images, lines, columns=8).save(content, "PNG", optimize=True)
    return content.getvalue()


@plot_style()
def draw_map(found: Dynamics, path: Path) -> None:
    """Confidence over variability, coloured by how often a sample was right, as Swayamdipta et al.
    2020 (figure 1) have it; and how mean margins are spread. At most 20,000 dots, the same ones
    each time. Raises OSError."""
    import matplotlib.pyplot as plt  # slow

    seen = np.flatnonzero(found.seen)
    dots = seen
    if len(seen) > _DOTS:
        dots = seen[np.argsort(uniforms((len(seen),), 0, "data map"), kind="stable")[:_DOTS]]
    figure, (left, side) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=(3, 2))
    drawn = left.scatter(
        found.variability[dots],
        found.confidence[dots],
        s=6,
        c=found.right[dots],
        cmap="coolwarm_r",
        vmin=0,
        vmax=1,
        linewidths=0,
        alpha=0.7,
    )
    figure.colorbar(drawn, label="share of visits at which it was right")
    of = f"{len(dots):,} of {len(seen):,} samples" if len(dots) < len(seen) else "all samples"
    left.set(title=f"Data map, {of}", xlabel="variability of p(true)", ylabel="confidence")
    left.set_ylim(0, 1)
    margins = found.margin[seen]
    below = margins[margins < 0]
    bins = np.histogram_bin_edges(margins, 60)
    side.hist(margins, bins, color=BLUE)
    side.hist(below, bins, color=ORANGE)
    side.axvline(0, color=MUTED, linewidth=1, linestyle=":")
    side.set(title=f"Mean margin, {len(below):,} below 0", xlabel="margin", ylabel="samples")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _page(looked: Looked, summary: dict[str, Any]) -> str:
    rows = looked.rows(looked.found.ranking()[:_PICTURES])
    parts = [
        pages.sentences(in_words(summary)),
        pages.picture("Data map", MAP),
        pages.picture("Probable label errors, the lowest mean margins first", ERRORS),
        pages.table("key", ("class", *COLUMNS), rows),
        "<h2>Classes with a mean margin below 0</h2>\n",
        pages.table("class", ("samples", "margin_below_0"), summary["classes"]),
    ]
    return pages.page(f"Samples of {looked.run.name}", parts)
