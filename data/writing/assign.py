"""Which sample goes into which split, which shard, and where in it: from its key alone."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
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
    samples in the order of a hash of their keys.
    """
    splits = np.full(len(source.keys), "train", "<U5")
    if source.splits is None:
        fractions = fractions or source.fractions
    else:
        splits[:] = source.splits
        own = set(source.splits.tolist())
        fractions = fractions or ((1.0,) if "val" in own or "train" not in own else (0.9, 0.1))
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
    for first, last in itertools.pairwise(edges):
        counts = largest_remainder(int(last - first), fractions)
        splits[order[first:last]] = np.repeat(SPLITS[: len(counts)], counts)
    return splits


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
    """One archive to write: the samples at positions `items` of the source, in this order."""

    name: str
    items: npt.NDArray[np.int64]


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
        shards = [
            Shard(f"{split}/{number:06d}.tar", inside[first : first + per_shard])
            for number, first in enumerate(range(0, len(inside), per_shard))
        ]
        together = 1
        if source.groups is not None and shards:
            together = math.ceil(len(shards) / len(np.unique(windows[inside])))
        tasks += [shards[i : i + together] for i in range(0, len(shards), together)]
    return tasks
