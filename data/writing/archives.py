"""WebDataset archives as a source: they are divided and indexed anew, their keys stay."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.data.classes import UNLABELLED, read_classes
from bigbatch.data.energon import EXCLUDED, energon_parts
from bigbatch.data.index import (
    MAX_UNNAMED,
    OURS,
    is_shard,
    members_passed_over,
    scan_shards,
)
from bigbatch.data.splits import SPLIT_NAMES, told_splits
from bigbatch.data.targets import join_targets
from bigbatch.data.writing.sources import Source
from bigbatch.data.writing.tree import Tree, walk


@dataclass(frozen=True, eq=False)
class _Ranges:
    """Reads byte ranges of archives."""

    paths: list[str]
    shards: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def __call__(self, i: int) -> bytes:
        with open(self.paths[self.shards[i]], "rb") as file:
            data = os.pread(file.fileno(), int(self.sizes[i]), int(self.offsets[i]))
        if len(data) < self.sizes[i]:
            raise OSError("the archive has become shorter")
        return data


def tars(
    path: Path,
    workers: int,
    label_key: str | None = None,
    tree: Tree | None = None,
    target_key: str | None = None,
) -> Source:
    """WebDataset archives: one, a folder of *.tar, or SPLIT/*.tar; keys stay as they are.

    Class names come from a classes.txt beside or above the archives; `label_key` names the
    entry of KEY.json that is the label, `target_key` that of numbers, which else are those of
    KEY.target.json or .npy. The split is that of .nv-meta/split.yaml, where there
    is one, else that of the folder names, else of the file names. Samples without a label,
    second ones of the same key in a split, and what lies behind damage are skipped. `tree` is
    what lies below `path`.
    """
    files, splits, skipped = _archives(path, tree)
    scans = scan_shards(files, workers, label_key=label_key, target_key=target_key)
    names = [str(file.relative_to(path)) if file != path else file.name for file in files]
    problems = [
        (name + where.removeprefix(file.name), what)  # val/0.tar, for there may be a train/0.tar
        for name, file, scan in zip(names, files, scans, strict=True)
        for where, what in scan.problems
    ]
    skipped += problems
    taken: set[tuple[str, str]] = set()
    rows, numbers = [], list[bytes]()
    for shard, scan in enumerate(scans):
        for i, key in enumerate(scan.keys):
            if (splits[shard], key) in taken:  # a reader sees one split at a time
                skipped.append((key, f"{names[shard]}: has the key of an earlier sample"))
                continue
            taken.add((splits[shard], key))
            rows.append((key, shard, scan.offsets[i], scan.sizes[i], scan.labels[i]))
            numbers.append(scan.targets[i])
    target, odd = join_targets(numbers)
    reasons = dict(odd)
    if any(row[4] >= 0 for i, row in enumerate(rows) if i not in reasons):
        reasons |= {i: "has no label" for i, row in enumerate(rows) if row[4] < 0}
    skipped += [(rows[i][0], f"{names[rows[i][1]]}: {why}") for i, why in reasons.items()]
    numbers = [each for i, each in enumerate(numbers) if i not in reasons]
    rows = [row for i, row in enumerate(rows) if i not in reasons]
    if not rows:
        raise _nothing(path, problems)
    for what, count in members_passed_over(scans).items():
        skipped.append((f"{count:,} {what}", "no part of a sample"))
    columns = np.array([row[1:] for row in rows], np.int64).T
    highest = int(columns[3].max())
    classes = _classes(files)
    if highest < 0:  # targets alone
        classes, columns[3], highest = UNLABELLED, 0, 0
    if classes is None and highest >= MAX_UNNAMED:
        raise UserError(
            f"{path} has label {highest}; without a classes.txt they are below {MAX_UNNAMED:,}: "
            "give class numbers that count from 0, or a classes.txt with a line for each class"
        )
    if classes is None:
        classes = tuple(map(str, range(highest + 1)))
    if highest >= len(classes):
        raise UserError(
            f"{path} has label {highest}, but classes.txt names {len(classes)} classes; "
            "give each class a line"
        )
    return Source(
        keys=[row[0] for row in rows],
        labels=columns[3].astype(np.int32),
        classes=classes,
        read=_Ranges([str(f) for f in files], *columns[:3]),
        splits=np.array(splits)[columns[0]] if splits[0] else None,
        skipped=skipped,
        targets=None if target is None else numbers,
    )


def _classes(files: Sequence[Path]) -> tuple[str, ...] | None:
    """The class names, which all folders must number alike; None where none has a classes.txt."""
    first: dict[tuple[str, ...], Path] = {}  # where each list of names was found first
    for folder in dict.fromkeys(file.parent for file in files):
        names = read_classes(folder)
        if names is not None:
            first.setdefault(names, folder)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise UserError(
            f"the classes.txt of {one} and of {other} differ, so a label does not mean the same "
            "in both; give both the same lines, and labels that go with them"
        )
    return next(iter(first), None)


def _archives(path: Path, tree: Tree | None) -> tuple[list[Path], list[str], list[tuple[str, str]]]:
    """The archives to read, the split of each ("" for none), and what else lies there."""
    if path.is_file():
        return [path], [""], []
    tree = tree or walk(path)
    names = [name for name in tree.files if is_shard(name.rpartition("/")[2])]
    for name in sorted(set(tree.files) - set(names)):
        if not _is_ours(name, tree):
            tree.passes_over(name, "no archive that is read (*.tar)")
    files = [path / name for name in names]
    parts = energon_parts(files) if files else None
    if parts is not None:
        return _by_part(path, names, parts, tree)
    splits = [SPLIT_NAMES.get(n.partition("/")[0].lower(), "") if "/" in n else "" for n in names]
    splits = splits if any(splits) else told_splits(names)
    if any(splits):
        for name, split in zip(names, splits, strict=True):
            if not split:
                tree.passes_over(name, "an archive of no split")
        chosen = [(p, s) for p, s in zip(files, splits, strict=True) if s]
        files, splits = [p for p, _ in chosen], [s for _, s in chosen]
    if not files:
        raise UserError(f"{path} holds no *.tar shards; give the folder that holds them")
    return files, splits, tree.skipped


def _by_part(
    path: Path, names: Sequence[str], parts: Sequence[str], tree: Tree
) -> tuple[list[Path], list[str], list[tuple[str, str]]]:
    unknown = {part for part in parts if part != EXCLUDED and part.lower() not in SPLIT_NAMES}
    if unknown:
        raise UserError(
            f"{path}: its .nv-meta/split.yaml has a part {min(unknown)!r}; known are "
            f"{', '.join(SPLIT_NAMES)}; rename it"
        )
    chosen = []
    for name, part in zip(names, parts, strict=True):
        if part == EXCLUDED:
            tree.passes_over(name, "excluded by .nv-meta/split.yaml")
        else:
            chosen.append((path / name, SPLIT_NAMES[part.lower()]))
    if not chosen:
        raise UserError(f"{path}: its .nv-meta/split.yaml excludes every archive; mend it")
    return [p for p, _ in chosen], [s for _, s in chosen], tree.skipped


def _is_ours(name: str, tree: Tree) -> bool:
    """Whether a file is what `bigbatch shard` or `bigbatch index` writes beside shards."""
    folder, _, base = name.rpartition("/")
    beside = folder.rpartition("/")[2] == "index" and (tree.root / folder / "manifest.json")
    return base in OURS or bool(beside and beside.is_file())


def _nothing(path: Path, problems: Sequence[tuple[str, str]]) -> UserError:
    first = f"; the first problem: {': '.join(problems[0])}" if problems else ""
    return UserError(
        f"{path} holds no image with a label (.cls){first}; label the images, or unpack them "
        "into CLASS/NAME.jpg and shard that folder"
    )
