"""Sources in columns: Parquet files, and Hugging Face datasets saved to disk (Arrow).

Layouts: an image column that is binary, or Hugging Face's struct {bytes, path}; a label
column of integers (named by the schema's metadata where it has names) or of strings; an
optional `split` column. The `datasets` package is not needed.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bigbatch.configs.errors import UserError
from bigbatch.data.writing.sources import SPLIT_NAMES, Source, printable

_IMAGE_COLUMNS = ("image", "img", "jpeg", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")
_MAX_CLASSES = 1 << 20
# Row groups are read whole; a process holds this many bytes of them, or one.
_WINDOW_BYTES = 256 << 20


def parquet(path: Path, image: str | None, label: str | None) -> Source:
    """A Parquet file, or a folder of them such as a Hugging Face repository.

    `image` and `label` name the columns; without them they are found by type and name. The
    split comes from a `split` column, or from file or folder names (train-00000-of-00004).
    Keys are row numbers, counted through the files in the order of their names.
    """
    paths = [path]
    if path.is_dir():
        below = sorted(path.rglob("*.parquet"))
        paths = [p for p in below if not any(x.startswith(".") for x in p.relative_to(path).parts)]
    files = [pq.ParquetFile(p) for p in paths]
    schema = files[0].schema_arrow
    for p, file in zip(paths, files, strict=True):
        if file.schema_arrow.names != schema.names:
            raise UserError(
                f"{p} has the columns {', '.join(file.schema_arrow.names)}, {paths[0]} has "
                f"{', '.join(schema.names)}; give files with the same columns"
            )
    columns = _Columns.find(schema, path, image, label)
    tables = [file.read(columns=columns.small) for file in files]
    metadata = [file.metadata for file in files]
    groups = [(f, g) for f, m in enumerate(metadata) for g in range(m.num_row_groups)]
    rows = np.array([metadata[f].row_group(g).num_rows for f, g in groups], np.int64)
    volume = sum(metadata[f].row_group(g).total_byte_size for f, g in groups)
    window = max(1, int(_WINDOW_BYTES * len(groups) / max(1, volume)))
    starts = np.concatenate([[0], np.cumsum(rows)])
    reader = _RowGroups([str(p) for p in paths], groups, starts, columns.image, window)
    return _source(
        path,
        columns,
        tables,
        splits=[_split_of(p, path) for p in paths],
        read=reader,
        groups=np.repeat(np.arange(len(rows)), rows),
        window=window,
    )


def saved_dataset(path: Path, image: str | None, label: str | None) -> Source:
    """A folder that Hugging Face's `Dataset` or `DatasetDict` saved with `save_to_disk`."""
    names = [""]
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
    paths: list[Path] = []
    splits: list[str] = []
    for name in names:
        state = json.loads((path / name / "state.json").read_text())
        if state.get("_indices_data_files"):
            raise UserError(
                f"{path / name} is a view of another order; save it after flatten_indices()"
            )
        files = [path / name / file["filename"] for file in state["_data_files"]]
        paths += files
        splits += [_known_split(name, path) if name else ""] * len(files)
    tables = [_map(p) for p in paths]
    columns = _Columns.find(tables[0].schema, path, image, label)
    small = [table.select(columns.small) for table in tables]
    starts = np.concatenate([[0], np.cumsum([len(table) for table in tables])])
    reader = _Mapped([str(p) for p in paths], starts, columns.image)
    return _source(path, columns, small, splits=splits, read=reader)


@dataclass(frozen=True)
class _Columns:
    """Names of the columns, and of the classes where the schema gives them."""

    image: str
    label: str
    split: str | None
    classes: tuple[str, ...] | None

    @property
    def small(self) -> list[str]:
        """The columns that are read at once, for all rows."""
        return [self.label] + ([self.split] if self.split else [])

    @classmethod
    def find(
        cls, schema: pa.Schema, path: Path, image: str | None, label: str | None
    ) -> "_Columns":
        metadata = schema.metadata or {}
        features = (
            json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        )
        images = [f.name for f in schema if _holds_images(f.type)]
        labels = [n for n, f in features.items() if _is_class_label(f)]
        image = _choose("image", image, schema.names, images, _IMAGE_COLUMNS, path)
        label = _choose("label", label, schema.names, labels, _LABEL_COLUMNS, path)
        classes = features[label]["names"] if label in labels else None
        if classes is None and b"class_names" in metadata:
            classes = metadata[b"class_names"].decode().split(",")
        split = "split" if "split" in schema.names else None
        return cls(image, label, split, tuple(map(printable, classes)) if classes else None)


def _is_class_label(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel"


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _choose(
    what: str,
    given: str | None,
    names: Sequence[str],
    by_type: Sequence[str],
    by_name: Sequence[str],
    path: Path,
) -> str:
    """The column asked for, else the only one of the right type, else the first known name."""
    if given is None:
        found = list(by_type) if len(by_type) == 1 else [n for n in by_name if n in names]
        if found and (what == "label" or found[0] in by_type):
            return found[0]
    elif given in names:
        return given
    raise UserError(
        f"{path} has no {what} column{f' {given!r}' if given else ' that can be told by itself'}; "
        f"name one of {', '.join(names)} with --{what}-column"
    )


def _source(
    path: Path,
    columns: _Columns,
    tables: Sequence[pa.Table],
    *,
    splits: Sequence[str],
    read: Any,
    groups: npt.NDArray[np.int64] | None = None,
    window: int = 1,
) -> Source:
    """A Source from the small columns of each file, and the split of each file ("" for none)."""
    column = pa.chunked_array([c for t in tables for c in t[columns.label].chunks])
    labels, classes = _labels(column, columns, path)
    if columns.split:
        text = pa.chunked_array(
            [c for t in tables for c in t[columns.split].cast(pa.string()).chunks]
        )
        own = np.array([_known_split(s, path) for s in text.to_pylist()])
    else:
        own = np.repeat(np.array(splits), [len(t) for t in tables])
    if len(set(own.tolist())) > 1 and "" in own:
        raise UserError(f"{path}: some of its files belong to a split and some to none; name all")
    labelled = labels >= 0
    missing = len(labels) - int(labelled.sum())
    return Source(
        keys=[f"{row:08d}" for row in np.flatnonzero(labelled)],
        labels=labels[labelled],
        classes=classes,
        read=_Selected(read, np.flatnonzero(labelled)) if missing else read,
        splits=own[labelled] if own[0] else None,
        groups=groups[labelled] if groups is not None else None,
        window=window,
        skipped=[(f"{missing:,} rows", f"no {columns.label}")] if missing else [],
    )


def _labels(
    column: pa.ChunkedArray, columns: _Columns, path: Path
) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Class numbers, int32 [N], -1 where there is no label; and the names of the classes."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        text = column.cast(pa.string())
        names = sorted(name for name in text.unique().to_pylist() if name is not None)
        numbers = pc.index_in(text, pa.array(names, pa.string()))
        labels = numbers.fill_null(-1).to_numpy().astype(np.int32)
        return labels, tuple(map(printable, names))
    if not pa.types.is_integer(kind):
        raise UserError(
            f"{path}: column {columns.label} holds {kind}, not class numbers or names; name "
            "another with --label-column"
        )
    values = column.cast(pa.int64()).fill_null(-1).to_numpy()
    highest = int(values.max(initial=-1))
    limit = len(columns.classes) if columns.classes else _MAX_CLASSES
    if not 0 <= highest < limit:
        raise UserError(
            f"{path}: the highest value in column {columns.label} is {highest}; class numbers here "
            f"go from 0 to {limit - 1}; name another column with --label-column"
        )
    classes = columns.classes or tuple(map(str, range(highest + 1)))
    return np.maximum(values, -1).astype(np.int32), classes


def _split_of(file: Path, root: Path) -> str:
    """The split that a file's name or a folder above it tells: train-00000-of-00014.parquet."""
    parts = (file.relative_to(root) if root.is_dir() else Path(file.name)).with_suffix("").parts
    for part in reversed(parts):
        word = re.split(r"[^a-z]", part.lower())[0]
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return ""


def _known_split(name: str | None, path: Path) -> str:
    if name is None or name.lower() not in SPLIT_NAMES:
        raise UserError(
            f"{path} has a split {name!r}; known are {', '.join(SPLIT_NAMES)}; rename or remove it"
        )
    return SPLIT_NAMES[name.lower()]


@dataclass(frozen=True, eq=False)
class _Selected:
    """Reads row rows[i]: the labelled rows of a table."""

    read: Any
    rows: npt.NDArray[np.int64]

    def __call__(self, i: int) -> bytes:
        data: bytes = self.read(int(self.rows[i]))
        return data


@dataclass(eq=False)
class _RowGroups:
    """Reads image i out of Parquet, keeping the row groups that were used last."""

    paths: list[str]
    groups: list[tuple[int, int]]
    starts: npt.NDArray[np.int64]
    column: str
    window: int
    cache: dict[int, pa.Array] = field(default_factory=dict)

    def __call__(self, i: int) -> bytes:
        group = int(np.searchsorted(self.starts, i, "right")) - 1
        # A dict keeps insertion order: moving a group to the end makes the first the oldest.
        rows = self.cache.pop(group, None)
        if rows is None:
            while len(self.cache) >= self.window:
                del self.cache[next(iter(self.cache))]
            rows = self._read(group)
        self.cache[group] = rows
        return _image_bytes(rows, i - int(self.starts[group]), self.paths[self.groups[group][0]])

    def _read(self, group: int) -> pa.Array:
        file, number = self.groups[group]
        try:
            table = pq.ParquetFile(self.paths[file]).read_row_group(number, columns=[self.column])
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's fault, not the file's
            text = str(error).strip()
            raise OSError(f"{self.paths[file]}, row group {number}: {text}") from None
        return table[self.column].combine_chunks()


@dataclass(eq=False)
class _Mapped:
    """Reads image i out of memory-mapped Arrow files, opened on first use."""

    paths: list[str]
    starts: npt.NDArray[np.int64]
    column: str
    opened: dict[int, tuple[list[pa.Array], npt.NDArray[np.int64]]] = field(default_factory=dict)

    def __call__(self, i: int) -> bytes:
        file = int(np.searchsorted(self.starts, i, "right")) - 1
        if file not in self.opened:
            chunks = _map(Path(self.paths[file]))[self.column].chunks
            self.opened[file] = chunks, np.cumsum([0] + [len(c) for c in chunks])
        chunks, edges = self.opened[file]
        row = i - int(self.starts[file])
        chunk = int(np.searchsorted(edges, row, "right")) - 1
        return _image_bytes(chunks[chunk], row - int(edges[chunk]), self.paths[file])


def _map(path: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _image_bytes(column: pa.Array, row: int, file: str) -> bytes:
    """The encoded image of one row: from binary, from a struct, or from the path in a struct."""
    if pa.types.is_struct(column.type):
        value = column[row].as_py()
        if value is None:
            raise OSError("no image in this row")
        if value["bytes"] is None and value.get("path"):
            return (Path(file).parent / value["path"]).read_bytes()
        data = value["bytes"]
    else:
        data = column[row].as_py()
    if data is None:
        raise OSError("no image in this row")
    return bytes(data)
