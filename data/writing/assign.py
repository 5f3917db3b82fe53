"""Which sample goes into which split, which shard, and where in it: from its key alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.configs.words import plural
from bigbatch.data.classes import UNLABELLED
from bigbatch.data.rng import key64
from bigbatch.data.writing.sources import Source

SPLITS = ("train", "val", "test")


def parse_fractions(text: str) -> tuple[float, ...]:
    """Read "0.8,0.1,0.1": the fractions of train, val and test, which add up to 1."""
    try:
        fractions = tuple(float(part) for part in text.split(","))
    except ValueError:
        fractions = ()
    if (
        not 1 <= len(fractions) <= len(SPLITS)
        or not all(0 <= f <= 1 for f in fractions)
        or fractions[0] == 0
        or not math.isclose(sum(fractions), 1, abs_tol=1e-6)
    ):
        raise UserError(
            f"split {text!r} is not fractions of train, val and test that add up to 1, "
            "such as 0.8,0.1,0.1"
        )
    return fractions


def assign_splits(source: Source, fractions: Sequence[float] | None) -> npt.NDArray[np.str_]:
    """The split of each sample, str [N].

    A source's own splits stay as they are, except that a tenth of its training samples
    becomes `val` where it has none: something must choose snapshots, and never the test
    split. `fractions` divides the samples of a source without splits, or the training
    samples of one with. Division is stratified: each class by largest remainder, its
    samples in the order of a hash of their keys. Where the classes are so small that this
    leaves a split empty, they share the remainders (`_shared`).
    """
    splits = np.full(len(source.keys), "train", "<U5")
    fractions = fractions or _usual_fractions(source)
    if source.splits is not None:
        splits[:] = source.splits
        own = set(source.splits.tolist())
        for name, fraction in zip(SPLITS[1:], fractions[1:], strict=False):
            if fraction > 0 and name in own:
                raise UserError(
                    f"split {fraction:g} of the training samples as {name}: the source has its "
                    f"own {name} split; give 0 for it"
                )
    pool = np.flatnonzero(splits == "train")
    labels = source.labels[pool]
    order = pool[np.lexsort((_hashes("split", source.keys)[pool], labels))]
    edges = np.searchsorted(source.labels[order], np.arange(len(source.classes) + 1))
    sizes = np.diff(edges).tolist()
    counts = [largest_remainder(size, fractions) for size in sizes]
    if any(f > 0 and total == 0 for f, total in zip(fractions, np.sum(counts, 0), strict=True)):
        counts = _shared(sizes, fractions)
    for first, row in zip(edges.tolist(), counts, strict=False):
        splits[order[first : first + sum(row)]] = np.repeat(SPLITS[: len(row)], row)
    return splits


def _usual_fractions(source: Source) -> Sequence[float]:
    if source.splits is None:
        return source.fractions
    own = set(source.splits.tolist())
    return (1.0,) if "val" in own or "train" not in own else (0.9, 0.1)


def _shared(sizes: Sequence[int], fractions: Sequence[float]) -> list[list[int]]:
    """How many samples of each class go into each split, near the fractions over all classes.

    The first sample of each class is for training. Each further one, class by class, goes to
    the split that is furthest behind its fraction.
    """
    rows, given, total = [], [0] * len(fractions), 0
    for size in sizes:
        row = [0] * len(fractions)
        for i in range(size):
            total += 1
            behind = [f * total - n for f, n in zip(fractions, given, strict=True)]
            split = behind.index(max(behind)) if i else 0
            row[split] += 1
            given[split] += 1
        rows.append(row)
    return rows


def doubts(
    source: Source, splits: npt.NDArray[np.str_], fractions: Sequence[float] | None
) -> list[str]:
    """What is probably not meant: one class alone, classes and splits without a sample."""
    counts = np.bincount(source.labels, minlength=len(source.classes))
    empty = np.flatnonzero(counts == 0).tolist()
    found = []
    if len(counts) - len(empty) == 1 and source.classes != UNLABELLED:
        found.append("all samples are of one class: there is nothing to tell apart")
    if empty:
        odd = empty == [0] and not source.skipped  # else its samples may be among those left out
        hint = "; class numbers go from 0, do these go from 1?" if odd else ""
        names = ", ".join(source.classes[c] for c in empty[:5]) + (", ..." * (len(empty) > 5))
        found.append(f"{len(empty):,} of {len(counts):,} classes have no sample: {names}{hint}")
    if source.splits is not None and not (splits == "test").any():
        found.append("the source has no test split: runs will report scores of val alone")
    wanted = fractions or _usual_fractions(source)
    for split, fraction in zip(SPLITS, wanted, strict=False):
        there = np.bincount(source.labels[splits == split], minlength=len(counts)) > 0
        lacking = int(((counts > 0) & ~there).sum())
        if split != "train" and there.any() and lacking:
            found.append(
                f"{lacking:,} of {plural(len(counts), 'class')} have no sample in {split}: nothing "
                "is measured of them there; larger shares, such as --split 0.5,0.25,0.25, give "
                "more of them some"
            )
        if fraction > 0 and not (splits == split).any():
            found.append(
                f"no sample is left for {split}: {plural(len(splits), 'sample')} in "
                f"{plural(len(counts), 'class')} are too few for these fractions; give others with "
                "--split, such as 0.5,0.25,0.25, or 1 for training alone"
            )
    return found


def largest_remainder(total: int, fractions: Sequence[float]) -> list[int]:
    """Whole numbers near total * fractions that add up to total; ties go to the first."""
    exact = [total * f / sum(fractions) for f in fractions]
    counts = [math.floor(x + 1e-9) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _hashes(purpose: str, keys: Sequence[str]) -> npt.NDArray[np.uint64]:
    return np.fromiter((key64("shard", purpose, k) for k in keys), np.uint64, len(keys))


@dataclass(frozen=True, eq=False)
class Shard:
    """One archive to write: the samples at positions `items` of the source, in this order.

    `windows`, ascending, number what must be in memory for each: see Source.window.
    """

    name: str
    items: npt.NDArray[np.int64]
    windows: npt.NDArray[np.int64]


def plan_shards(source: Source, splits: npt.NDArray[np.str_], per_shard: int) -> list[list[Shard]]:
    """All shards, in lists that one process should write.

    The samples of a split are shuffled by a hash of their keys, so that also a reader that
    goes through a shard in order sees mixed classes. Where reading has a grain, its groups
    are shuffled, and then the samples of `window` groups at a time.
    """
    hashes = _hashes("order", source.keys)
    windows = np.zeros(len(hashes), np.int64)
    if source.groups is not None:
        order = np.argsort(_hashes("group", list(map(str, range(int(source.groups.max()) + 1)))))
        windows = (np.argsort(order) // source.window)[source.groups]
    tasks = []
    for split in SPLITS:
        inside = np.flatnonzero(splits == split)
        inside = inside[np.lexsort((hashes[inside], windows[inside]))]
        parts = [inside[first : first + per_shard] for first in range(0, len(inside), per_shard)]
        shards = [
            Shard(f"{split}/{number:06d}.tar", items, windows[items])
            for number, items in enumerate(parts)
        ]
        together = 1
        if source.groups is not None and shards:
            together = math.ceil(len(shards) / len(np.unique(windows[inside])))
        tasks += [shards[i : i + together] for i in range(0, len(shards), together)]
    return tasks
