"""Parquet files below a folder: which of them are one table, and which split each holds."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.data.splits import SPLIT_NAMES, told_splits
from bigbatch.data.writing.tree import Tree, walk

_NUMBERED = re.compile(r"(.*?)[-_.]?(\d+)-of-(\d+)(?!\d).*")  # train-00000-of-00004-1f2e


@dataclass(frozen=True)
class TableFiles:
    """Parquet files in the order of their names, the split of each ("" for none), and what of
    the folder was passed over: (what, why)."""

    root: Path
    paths: list[Path]
    splits: list[str]
    skipped: list[tuple[str, str]]

    def name(self, path: Path) -> str:
        """How messages call a file."""
        return str(path.relative_to(self.root)) if path != self.root else path.name


def find_tables(root: Path, tree: Tree | None = None) -> TableFiles:
    """The file, or all *.parquet below a folder; UserError where they are several data sets.

    As Spark and Hive write them, a table may be a folder (train.parquet/part-00000.parquet);
    names that begin with a dot or "_" are not data.
    """
    if not root.is_dir():
        return TableFiles(root, [root], [_split(Path(root.name))[0]], [])
    tree = tree or walk(root)
    below = sorted(root / name for name in tree.files if name.lower().endswith(".parquet"))
    hidden = [p for p in below if any(x[0] == "_" for x in p.relative_to(root).parts)]
    paths = [p for p in below if p not in set(hidden)]
    if not paths:
        raise UserError(
            f"{root} holds no .parquet file; names that begin with a dot or _ are not read"
        )
    told = {p: _split(p.relative_to(root)) for p in paths}
    if not any(split for split, _ in told.values()):  # cifar-train.parquet, cifar-test.parquet
        files = [p.relative_to(root) for p in paths]
        loose = told_splits([file.as_posix() for file in files])
        told = {
            path: (split, len(file.parts) - 1)
            for path, file, split in zip(paths, files, loose, strict=True)
        }
    _ask_which(root, told)
    skipped = [(str(p.relative_to(root)), "its name begins with _") for p in hidden]
    return TableFiles(root, paths, [told[p][0] for p in paths], skipped + _missing(root, paths))


def _split(file: Path) -> tuple[str, int]:
    """The split that a file's name or a folder above it tells, and which part of the path.

    train-00000-of-00014.parquet, train/0000.parquet, split=train/0.parquet, and partial-train/,
    as the Hugging Face Hub calls the beginning of a large split.
    """
    parts = file.parts
    for at in range(len(parts) - 1, -1, -1):
        name = parts[at].lower().removeprefix("partial-").removeprefix("split=")
        word = re.split(r"[^a-z]", name)[0]
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word], at
    return "", -1


def _piece(file: Path, at: int) -> str:
    """Which piece of a table a file is: its number where its name has one.

    `at` is the part of the path that tells the split: a folder, or the file's name up to its
    number. Folders such as year=2024 are Hive's way of dividing one table.
    """
    hive = "".join(f"{part}/" for part in file.parts[:at] if "=" in part)
    if at < len(file.parts) - 1:
        return hive + "/".join(file.parts[at + 1 :])
    numbered = _NUMBERED.fullmatch(file.stem)
    if numbered:
        return hive + numbered[2]
    return hive + (re.sub(r"^\D*[-_.]|^\D+(?=\d)", "", file.stem) or file.stem)


def _ask_which(root: Path, told: dict[Path, tuple[str, int]]) -> None:
    """Two tables of one split, each with a first piece, are two data sets in one folder."""
    pieces: dict[tuple[str, str], Path] = {}
    for path, (split, at) in told.items():
        file = path.relative_to(root)
        if not split:
            continue
        other = pieces.setdefault((split, _piece(file, at)), file)
        if other != file:
            raise UserError(
                f"{root} holds two tables for the split {split}: {other} and {file}; where they "
                "are two data sets (configurations), give the path of one, else move the files "
                "of one table into one folder and number them through"
            )


def _missing(root: Path, paths: list[Path]) -> list[tuple[str, str]]:
    """Tables of which less is here than the names of their files say."""
    found: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for path in paths:
        if numbered := _NUMBERED.fullmatch(path.stem):
            found[path.parent, numbered[1], int(numbered[3])].add(int(numbered[2]))
    return [
        (
            str((folder / stem).relative_to(root)),
            f"{total - len(here):,} of {total:,} files missing",
        )
        for (folder, stem, total), here in found.items()
        if len(here) < total
    ]
