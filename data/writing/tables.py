"""Sources in columns: Parquet files, and Hugging Face datasets saved to disk (Arrow).

Layouts: an image column that is binary, or Hugging Face's struct {bytes, path}; a label
column of integers (named by the schema's metadata where it has names) or of strings; an
optional `split` column. The `datasets` package is not needed. columns.py chooses columns
and numbers the labels.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bigbatch.configs.errors import UserError
from bigbatch.configs.json_text import parse_json
from bigbatch.data.classes import UNLABELLED
from bigbatch.data.decode import LFS_POINTER
from bigbatch.data.writing.columns import (
    Columns,
    Part,
    find_columns,
    known_split,
    number_labels,
    own_splits,
    target_bytes,
)
from bigbatch.data.writing.sources import Source, printable
from bigbatch.data.writing.table_files import find_tables
from bigbatch.data.writing.tree import Tree

# What one process holds of row groups: this many bytes, or one row group while it is read.
_HELD_BYTES = 128 << 20
# Reading a row group takes up to this many times its size at once: its bytes in the file, the
# dictionary that some writers make of all its images (pyarrow where it has up to 1,024 rows),
# and the images (pyarrow 26, measured).
_READING = 3.2
_BATCH_BYTES = 1 << 20


def parquet(
    path: Path,
    image: str | None,
    label: str | None,
    tree: Tree | None = None,
    target: str | None = None,
) -> Source:
    """A Parquet file, or a folder of them such as a Hugging Face repository.

    `image` and `label` name the columns; without them they are found by type and name. The
    split comes from a `split` column, or from file or folder names (train-00000-of-00004).
    Keys are row numbers, counted through the files in the order of their names.
    """
    found = find_tables(path, tree)
    parts, files = [], []
    for name, split in zip(found.paths, found.splits, strict=True):
        with _naming(name):
            file = pq.ParquetFile(name)
            parts.append(Part(found.name(name), file.schema_arrow, split))
            files.append(file.metadata)
            file.close()
    columns = find_columns(parts, path, image, label, target)
    tables = []
    for name in found.paths:
        with _naming(name), pq.ParquetFile(name) as file:
            tables.append(file.read(columns=columns.small))
    groups = [(f, g) for f, m in enumerate(files) for g in range(m.num_row_groups)]
    rows = np.array([files[f].row_group(g).num_rows for f, g in groups], np.int64)
    largest = max((_size(files[f].row_group(g), columns.image) for f, g in groups), default=1)
    window = max(1, int(_HELD_BYTES / max(1, largest) - (_READING - 1)))
    starts = np.concatenate([[0], np.cumsum(rows)])
    reader = _RowGroups([str(p) for p in found.paths], groups, starts, columns.image, window)
    source = _source(
        path,
        columns,
        parts,
        tables,
        read=reader,
        groups=np.repeat(np.arange(len(rows)), rows),
        window=window,
        held=max(_HELD_BYTES, int(_READING * largest)),
    )
    source.skipped.extend(found.skipped)
    return source


def saved_dataset(
    path: Path, image: str | None, label: str | None, target: str | None = None
) -> Source:
    """A folder that Hugging Face's `Dataset` or `DatasetDict` saved with `save_to_disk`."""
    names = [""]
    if (path / "dataset_dict.json").is_file():
        names = _listed(path / "dataset_dict.json", "splits")
    paths: list[Path] = []
    splits: list[str] = []
    for name in names:
        folder = path / name
        state = _json(folder / "state.json")
        if state.get("_indices_data_files"):
            raise UserError(f"{folder} is a view of another order; save it after flatten_indices()")
        files = [folder / file for file in _listed(folder / "state.json", "_data_files")]
        paths += files
        splits += [known_split(name, path) if name else ""] * len(files)
    tables = [_map(p) for p in paths]
    parts = [
        Part(str(p.relative_to(path)), table.schema, split)
        for p, table, split in zip(paths, tables, splits, strict=True)
    ]
    columns = find_columns(parts, path, image, label, target)
    small = [table.select(columns.small) for table in tables]
    starts = np.concatenate([[0], np.cumsum([len(table) for table in tables])])
    reader = _Mapped([str(p) for p in paths], starts, columns.image)
    return _source(path, columns, parts, small, read=reader)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}; save the data set anew") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not what `save_to_disk` writes; save the data set anew")
    return found


def _listed(path: Path, key: str) -> list[str]:
    """The file or folder names that a JSON file of a saved data set lists: beside it, no paths."""
    names = _json(path).get(key)
    if isinstance(names, list):
        names = [n.get("filename") if isinstance(n, dict) else n for n in names]
        if names and all(
            isinstance(n, str) and re.fullmatch(r"[^/\0]*[^/\0.][^/\0]*", n) for n in names
        ):
            return names
    raise UserError(
        f"{path} lists no names of files beside it under {key!r}; save the data set anew"
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Arrow's errors do not say which file they speak of."""
    try:
        yield
    except UnicodeEncodeError:  # Arrow takes names as UTF-8
        raise UserError(f"the name {printable(str(path))} is not UTF-8; rename it") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {path}: {error.strerror}; mend or remove it") from None
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` there"
            ) from None
        raise UserError(
            f"cannot read {path}: {str(error).strip()}; it may be cut short: fetch it again, or "
            "remove it"
        ) from None


def _pages(group: Any, column: str) -> list[Any]:
    """The metadata of what holds a column in a row group: one for each field of a struct."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    return [c for c in chunks if c.path_in_schema.partition(".")[0] == column]


def _size(group: Any, column: str) -> int:
    """Bytes of a row group's images, by its metadata, in the file or out of it."""
    pages = _pages(group, column)
    return sum(max(c.total_uncompressed_size, c.total_compressed_size) for c in pages)


def _source(
    path: Path,
    columns: Columns,
    parts: Sequence[Part],
    tables: Sequence[pa.Table],
    *,
    read: Any,
    groups: npt.NDArray[np.int64] | None = None,
    window: int = 1,
    held: int = 0,
) -> Source:
    """A Source from the small columns of each file."""
    if columns.label is None:
        each, classes = [np.zeros(len(table), np.int32) for table in tables], UNLABELLED
    else:
        values = [table[columns.label] for table in tables]
        each, classes = number_labels(parts, columns, values, path)
    labels = np.concatenate(each)
    if columns.split:
        own = np.array(own_splits(tables, columns.split, path))
    else:
        own = np.repeat([part.split for part in parts], [len(t) for t in tables])
    if len(set(own.tolist())) > 1 and "" in own:
        raise UserError(f"{path}: some of its files belong to a split and some to none; name all")
    labelled = labels >= 0
    skipped = [
        (f"{part.name}: {_rows(np.flatnonzero(own < 0))}", f"no {columns.label}")
        for part, own in zip(parts, each, strict=True)
        if (own < 0).any()
    ]
    targets = None
    if columns.target is not None:
        numbers, odd = target_bytes(tables, columns.target)
        starts = np.cumsum([0, *(len(own) for own in each)])
        for part, start, stop in zip(parts, starts, starts[1:], strict=False):
            rows = defaultdict[str, list[int]](list)
            for i in (i for i in odd if start <= i < stop and labelled[i]):
                rows[odd[i]].append(i - start)
            skipped += [(f"{part.name}: {_rows(np.array(at))}", why) for why, at in rows.items()]
        labelled[list(odd)] = False
        targets = [numbers[i] for i in np.flatnonzero(labelled)]
        if not targets:
            raise UserError(
                f"{path}: no row has a target in column {columns.target}; name another with "
                "--target"
            )
    return Source(
        keys=[f"{row:08d}" for row in np.flatnonzero(labelled)],
        labels=labels[labelled],
        classes=classes,
        read=_Selected(read, np.flatnonzero(labelled)) if skipped else read,
        splits=own[labelled] if own[0] else None,
        groups=groups[labelled] if groups is not None else None,
        window=window,
        held=held,
        skipped=skipped,
        targets=targets,
    )


def _rows(rows: npt.NDArray[np.int64]) -> str:
    first = ", ".join(map(str, rows[:5]))
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {first}{more}"


@dataclass(frozen=True, eq=False)
class _Selected:
    """Reads row rows[i]: the labelled rows of a table."""

    read: Any
    rows: npt.NDArray[np.int64]

    def __call__(self, i: int) -> bytes:
        data: bytes = self.read(int(self.rows[i]))
        return data


class _Chunks:
    """Rows of one column in several arrays, one behind the other."""

    def __init__(self, arrays: Sequence[pa.Array]) -> None:
        self.arrays = arrays
        self.edges = np.cumsum([0] + [len(array) for array in arrays])

    def __getitem__(self, row: int) -> Any:
        chunk = int(np.searchsorted(self.edges, row, "right")) - 1
        return self.arrays[chunk][row - int(self.edges[chunk])].as_py()


@dataclass(eq=False)
class _RowGroups:
    """Reads image i out of Parquet, keeping the row groups that were used last."""

    paths: list[str]
    groups: list[tuple[int, int]]
    starts: npt.NDArray[np.int64]
    column: str
    window: int
    cache: dict[int, _Chunks] = field(default_factory=dict)

    def __call__(self, i: int) -> bytes:
        group = int(np.searchsorted(self.starts, i, "right")) - 1
        # A dict keeps insertion order: moving a group to the end makes the first the oldest.
        rows = self.cache.pop(group, None)
        if rows is None:
            while len(self.cache) >= self.window:
                del self.cache[next(iter(self.cache))]
            rows = self._read(group)
        self.cache[group] = rows
        return _image_bytes(rows[i - int(self.starts[group])], self.paths[self.groups[group][0]])

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache: another process would get a copy of all that is in it."""
        return {**self.__dict__, "cache": {}}

    def _read(self, group: int) -> _Chunks:
        number, at = self.groups[group]
        path = self.paths[number]
        pool = pa.default_memory_pool()
        alone = self.window == 1  # a group so large is all that may be held, and no byte more
        if alone:
            pool.release_unused()  # the pool would keep what was freed
        try:
            # Page by page, in batches: otherwise the group's bytes in the file stay beside it.
            with pq.ParquetFile(path, buffer_size=_BATCH_BYTES, pre_buffer=False) as file:
                metadata = file.metadata.row_group(at)
                each = max(1, _size(metadata, self.column) // max(1, metadata.num_rows))
                at_once = min(max(1, _BATCH_BYTES // each), 1024)
                if pa.types.is_dictionary(file.schema_arrow.field(self.column).type):
                    at_once = max(1, metadata.num_rows)  # each batch would copy all images
                rows = []
                for batch in file.iter_batches(
                    batch_size=at_once,
                    row_groups=[at],
                    columns=[self.column],
                    use_threads=False,
                ):
                    images = batch.column(0)
                    if alone:
                        images = pa.concat_arrays([images])  # without the room it had to grow
                        pool.release_unused()
                    rows.append(images)
            return _Chunks(rows)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's fault, not the file's
            text = str(error).strip()
            raise OSError(f"{path}, row group {at}: {text}") from None


@dataclass(eq=False)
class _Mapped:
    """Reads image i out of memory-mapped Arrow files, opened on first use."""

    paths: list[str]
    starts: npt.NDArray[np.int64]
    column: str
    opened: dict[int, _Chunks] = field(default_factory=dict)

    def __call__(self, i: int) -> bytes:
        file = int(np.searchsorted(self.starts, i, "right")) - 1
        if file not in self.opened:
            self.opened[file] = _Chunks(_map(Path(self.paths[file]))[self.column].chunks)
        return _image_bytes(self.opened[file][i - int(self.starts[file])], self.paths[file])

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: another process would get all of them as a copy."""
        return {**self.__dict__, "opened": {}}


def _map(path: Path) -> pa.Table:
    with _naming(path):
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _image_bytes(value: Any, file: str) -> bytes:
    """The encoded image of one row: from binary, from a struct, or from the path in a struct."""
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            return _beside(file, value["path"])
        value = value["bytes"]
    if value is None:
        raise OSError("no image in this row")
    return bytes(value)


def _beside(file: str, name: str) -> bytes:
    """An image that a table names instead of holding it; one from elsewhere is not read."""
    folder = os.path.dirname(os.path.abspath(file))
    path = os.path.normpath(os.path.join(folder, name))
    if os.path.commonpath([folder, path]) != folder or "\0" in name:
        raise OSError(f"the row names {name!r}, which does not lie beside or below its table")
    with open(path, "rb") as image:
        return image.read()
