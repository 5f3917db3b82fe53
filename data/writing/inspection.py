"""What is in a folder of shards: counts, labels, sizes, resolutions, and what is wrong."""

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google_crc32c import value as crc32c

from bigbatch.configs.errors import UserError
from bigbatch.configs.plot_style import plot_style
from bigbatch.data.index import Index, is_shard, open_index, verify_index
from bigbatch.data.targets import Targets
from bigbatch.data.writing.assign import SPLITS
from bigbatch.data.writing.recode import open_image, prepare
from bigbatch.data.writing.skips import count_skips, read_skips

_LONGEST = 24  # characters of a class's name in the picture
_LOOKED_AT = 5_000  # images of each split whose header is read


def inspect(root: Path, *, verify: bool = False, picture: Path | None = None) -> dict[str, Any]:
    """Describe DEST, or one split of it, in plain values that can be written as JSON.

    Labels and image sizes in bytes come from the index and are complete. Formats and
    resolutions come from up to 5,000 images of each split, evenly spaced; `verify` reads
    and decodes every image instead. `problems` lists, with shard and offset, what does not
    fit; `duplicates` counts images whose bytes occur more than once, within a split and
    between two of them. `left_out` counts by reason and extension what skipped.txt names, each
    split's `passed_over` what its index does; `notes` say what is probably not meant. `picture`
    is a file to draw the distributions into (.png, .svg, .pdf). Raises UserError where there
    are no shards at all.
    """
    root = Path(root)
    problems: list[str] = []
    splits: dict[str, dict[str, Any]] = {}
    indexes: dict[str, Index] = {}
    sides: dict[str, npt.NDArray[np.int64]] = {}
    for name, folder in _split_folders(root).items():
        try:
            index = open_index(folder)
            verify_index(index)
        except UserError as error:
            problems.append(str(error))
            continue
        problems += [f"{name}: {problem}" for problem in index.problems]
        formats, sides[name], bad = _look(index, verify)
        problems += [f"{name}/{problem}" for problem in bad]
        indexes[name] = index
        splits[name] = _describe(index, formats, sides[name])
        splits[name]["passed_over"] = index.passed_over
    if picture is not None and indexes:
        draw(indexes, sides, Path(picture))
    return {
        "root": str(root),
        "verified": verify,
        "splits": splits,
        "duplicates": _duplicates(indexes),
        "left_out": count_skips(_left_out(root)),
        "notes": _notes(indexes),
        "problems": problems,
    }


def _left_out(root: Path) -> list[tuple[str, str]]:
    """What `shard` noted beside or, for one split, above the shards."""
    return read_skips(root / "skipped.txt") or read_skips(root.absolute().parent / "skipped.txt")


def _notes(indexes: dict[str, Index]) -> list[str]:
    """What is probably not meant, of all splits together."""
    classes = {index.classes for index in indexes.values()}
    if len(classes) > 1:
        return [f"the splits have {len(classes)} different lists of classes"]
    if not classes:
        return []
    counts = np.sum([index.class_counts for index in indexes.values()], 0)
    empty = [name for name, n in zip(classes.pop(), counts.tolist(), strict=True) if n == 0]
    found = []
    if len(counts) - len(empty) == 1:
        found.append("all samples are of one class")
    if empty:
        found.append(f"classes without a sample in any split: {', '.join(empty[:5])}")
    return found


def _split_folders(root: Path) -> dict[str, Path]:
    """Folders of shards at or directly below `root`, by name, train first."""

    def holds_shards(path: Path) -> bool:
        return (path / "index").is_dir() or any(is_shard(p.name) for p in path.glob("*"))

    if holds_shards(root):
        return {root.name: root}
    below = {p.name: p for p in sorted(root.glob("*/")) if holds_shards(p)}
    if not below:
        how = "holds no shards" if root.exists() else "is not there"
        raise UserError(f"{root} {how}; give the folder that `bigbatch shard` wrote")
    first = [name for name in SPLITS if name in below]
    return {name: below[name] for name in (*first, *(n for n in below if n not in first))}


def _look(index: Index, verify: bool) -> tuple[Counter[str], npt.NDArray[np.int64], list[str]]:
    """Read images: how many of each format; widths and heights, int64 [n, 2]; problems."""
    chosen = np.arange(len(index))
    if not verify:
        chosen = np.unique(np.linspace(0, len(index) - 1, min(_LOOKED_AT, len(index)), dtype=int))
    formats: Counter[str] = Counter()
    sides, problems = [], []
    for shard, samples in itertools.groupby(chosen.tolist(), lambda i: int(index.shard[i])):
        name = index.shards[shard].name
        with (index.root / name).open("rb") as file:
            for i in samples:
                offset = int(index.offset[i])
                try:
                    data = os.pread(file.fileno(), int(index.size[i]), offset)
                    if crc32c(data) != index.crc[i]:
                        raise OSError("its bytes are not those that were indexed")
                    image = open_image(data)
                    if verify:
                        prepare(data, None, 0)
                except OSError as error:
                    problems.append(f"{name} at byte {offset:,}: {error}")
                    continue
                formats[str(image.format).lower()] += 1
                sides.append(image.size)
    return formats, np.array(sides, np.int64).reshape(-1, 2), problems


def _describe(index: Index, formats: Counter[str], sides: npt.NDArray[np.int64]) -> dict[str, Any]:
    counts = index.class_counts
    common = Counter(map(tuple, sides.tolist())).most_common(5)
    return {
        "samples": len(index),
        "shards": len(index.shards),
        "bytes": sum(s.bytes for s in index.shards),
        "hash": index.hash,
        "labels": dict(zip(index.classes, counts.tolist(), strict=True)),
        "imbalance": round(float(counts.max() / max(1, counts.min())), 2),
        "empty_classes": int((counts == 0).sum()),
        "image_bytes": _distribution(index.size),
        "looked_at": len(sides),
        "formats": dict(formats.most_common()),
        "width": _distribution(sides[:, 0]),
        "height": _distribution(sides[:, 1]),
        "short_side": _distribution(sides.min(axis=1)) if len(sides) else {},
        "resolutions": [{"width": w, "height": h, "images": n} for (w, h), n in common],
        **({} if index.target is None else {"targets": _targets(index.target)}),
    }


def _targets(target: Targets) -> list[dict[str, float]]:
    """Of each number that samples stand for: least, largest, mean and standard deviation."""
    columns = (target[:, k].astype(np.float64) for k in range(target.shape[1]))
    rows = [(c.min(), c.mean(), c.std(), c.max()) for c in columns]
    names = ("min", "mean", "std", "max")
    return [dict(zip(names, map(float, row), strict=True)) for row in rows]


def _distribution(values: npt.NDArray[Any]) -> dict[str, float]:
    if not len(values):
        return {}
    names = ("min", "p5", "median", "p95", "max")
    percentiles = np.percentile(values, [0, 5, 50, 95, 100])
    found = {name: round(float(p), 1) for name, p in zip(names, percentiles, strict=True)}
    return found | {"mean": round(float(values.mean()), 1)}


def _duplicates(indexes: dict[str, Index]) -> dict[str, int]:
    """Images that occur more than once, by CRC-32C and size; "train+test" is a leak."""
    prints = {
        name: (index.crc.astype(np.uint64) << np.uint64(32)) | index.size
        for name, index in indexes.items()
    }
    unique = {name: np.unique(values) for name, values in prints.items()}
    found = {name: len(prints[name]) - len(unique[name]) for name in prints}
    for one, other in itertools.combinations(prints, 2):
        found[f"{one}+{other}"] = len(np.intersect1d(unique[one], unique[other]))
    return {place: count for place, count in found.items() if count}


@plot_style()
def draw(indexes: dict[str, Index], sides: dict[str, npt.NDArray[np.int64]], path: Path) -> None:
    """Draw labels, image sizes and resolutions of each split into one picture."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    figure = Figure(figsize=(14, 4), layout="constrained")
    labels, sizes, resolutions = figure.subplots(1, 3)
    classes = next(iter(indexes.values())).classes
    bottom = np.zeros(len(classes))
    few = len(classes) <= 40
    low, high = _bounds([index.size for index in indexes.values()])
    wide = high > 10 * low
    edges = np.geomspace(low, high, 60) if wide else np.linspace(low, high, 60)
    for name, index in indexes.items():
        counts = index.class_counts
        if few and len(counts) == len(bottom):
            labels.bar(range(len(classes)), counts, bottom=bottom, label=name)
            bottom += counts
        else:
            labels.step(range(len(counts)), np.sort(counts)[::-1], where="mid", label=name)
        sizes.hist(index.size, bins=edges, histtype="step", label=name)
        resolutions.scatter(*sides[name].T, s=6, alpha=0.4, linewidths=0, label=name)
    labels.set(xlabel="class" if few else "class, by rank", ylabel="samples", title="Labels")
    sizes.set(
        xscale="log" if wide else "linear", xlabel="bytes", ylabel="images", title="Encoded size"
    )
    resolutions.set(xlabel="width, pixels", ylabel="height, pixels", title="Resolution")
    resolutions.set(xlim=(0, None), ylim=(0, None))
    resolutions.margins(0.1)
    for axis in (sizes.xaxis, resolutions.xaxis):
        if axis.get_scale() == "linear":
            axis.set_major_locator(MaxNLocator(4, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_minor_formatter(NullFormatter())
    names = labels.get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=len(indexes))
    if few:
        _name_classes(labels, classes)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot draw into {path}: {error}") from None


def _name_classes(axes: Any, classes: Sequence[str]) -> None:
    """The classes below their bars: upright, and not each of them, where they would overlap."""
    names = [name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "\u2026" for name in classes]
    for rotation, every in ((0, 1), *((90, every) for every in range(1, len(names) + 1))):
        axes.set_xticks(range(0, len(names), every), names[::every], rotation=rotation)
        if not overlapping(axes.xaxis.get_ticklabels()):
            return


def overlapping(texts: Sequence[Any]) -> bool:
    """Whether neighbours among texts of a figure, such as the labels of an axis, overlap."""
    if texts:
        texts[0].figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    return any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def _bounds(sizes: Sequence[npt.NDArray[np.uint32]]) -> tuple[float, float]:
    low = min(int(s.min()) for s in sizes)
    high = max(int(s.max()) for s in sizes)
    return max(1, low) * 0.9, max(2, high) * 1.1
