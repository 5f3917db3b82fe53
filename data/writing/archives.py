"""WebDataset archives as a source: they are divided and indexed anew, their keys stay."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.data.energon import EXCLUDED, energon_parts
from bigbatch.data.index import (
    OURS,
    is_shard,
    members_passed_over,
    read_classes,
    scan_shards,
)
from bigbatch.data.samples import Scan
from bigbatch.data.writing.sources import SPLIT_NAMES, Source, printable
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
    path: Path, workers: int, label_key: str | None = None, tree: Tree | None = None
) -> Source:
    """WebDataset archives: one, a folder of *.tar, or SPLIT/*.tar; keys stay as they are.

    Class names come from a classes.txt beside or above the archives; `label_key` names the
    entry of KEY.json that is the label. The split is that of .nv-meta/split.yaml, where there
    is one, else that of the folder names. Samples without a label, second ones of the same
    key, and what lies behind damage are skipped. `tree` is what lies below `path`.
    """
    files, splits, skipped = _archives(path, tree)
    scans = scan_shards(files, workers, label_key)
    skipped += [problem for scan in scans for problem in scan.problems]
    taken: set[str] = set()
    rows = []
    for shard, scan in enumerate(scans):
        for i, key in enumerate(scan.keys):
            if key in taken:
                why = f"{files[shard].name}: has the key of an earlier sample"
                skipped.append((printable(key), why))
                continue
            taken.add(key)
            rows.append((key, shard, scan.offsets[i], scan.sizes[i], scan.labels[i]))
    if not rows:
        raise _nothing(path, scans)
    for what, count in members_passed_over(scans).items():
        skipped.append((f"{count:,} {what}", "no part of a sample"))
    columns = np.array([row[1:] for row in rows], np.int64).T
    classes = read_classes(files[0].parent) or tuple(map(str, range(int(columns[3].max()) + 1)))
    if columns[3].max() >= len(classes):
        raise UserError(
            f"{path} has label {columns[3].max()}, but classes.txt names {len(classes)} classes; "
            "give each class a line"
        )
    return Source(
        keys=[row[0] for row in rows],
        labels=columns[3].astype(np.int32),
        classes=classes,
        read=_Ranges([str(f) for f in files], *columns[:3]),
        splits=np.array(splits)[columns[0]] if splits[0] else None,
        skipped=skipped,
    )


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
    if any(splits):
        for name, split in zip(names, splits, strict=True):
            if not split:
                tree.passes_over(name, "an archive in no folder of a split")
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


def _nothing(path: Path, scans: Sequence[Scan]) -> UserError:
    problems = [f"{where}: {what}" for scan in scans for where, what in scan.problems]
    first = f"; the first problem: {problems[0]}" if problems else ""
    return UserError(
        f"{path} holds no image with a label (.cls){first}; label the images, or unpack them "
        "into CLASS/NAME.jpg and shard that folder"
    )
