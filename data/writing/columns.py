"""Which columns of a table hold images, labels and splits; class numbers over several files.

Every file is asked for its own class names: two files of one data set may number the same
names in another order, and then a number alone means nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bigbatch.configs.errors import UserError
from bigbatch.configs.json_text import parse_json
from bigbatch.data.index import MAX_UNNAMED
from bigbatch.data.splits import SPLIT_NAMES
from bigbatch.data.targets import encode_target, join_targets
from bigbatch.data.writing.sources import printable

_IMAGE_COLUMNS = ("image", "img", "jpeg", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")
Labels = npt.NDArray[np.int32]  # [N], -1 where there is none


@dataclass(frozen=True)
class Part:
    """One file of a source: how messages call it, its schema, and the split of its name."""

    name: str
    schema: pa.Schema
    split: str = ""


@dataclass(frozen=True)
class Columns:
    """Names of the columns, and of the classes in each file (None where it has none)."""

    image: str
    label: str | None  # None: there are targets alone
    split: str | None
    classes: Sequence[tuple[str, ...] | None]
    target: str | None = None

    @property
    def small(self) -> list[str]:
        """The columns that are read at once, for all rows."""
        return [name for name in (self.label, self.target, self.split) if name]


def find_columns(
    parts: Sequence[Part],
    path: Path,
    image: str | None,
    label: str | None,
    target: str | None = None,
) -> Columns:
    """The columns asked for, else those that can be told; UserError where a file has them not.

    With a `target` there need be no label.
    """
    names = list(dict.fromkeys(name for part in parts for name in part.schema.names))
    fields = [f for part in parts for f in part.schema if holds_images(f.type)]
    features = [_features(part) for part in parts]
    by_type = [n for feature in features for n in feature if _is_class_label(feature[n])]
    image = _choose("image", image, names, [f.name for f in fields], _IMAGE_COLUMNS, path)
    if target is None:
        label = _choose("label", label, names, by_type, _LABEL_COLUMNS, path)
    else:
        label = _label_beside(target, label, names, by_type, path)
    split = "split" if "split" in names else None
    for column in filter(None, (image, label, target, split)):
        owner = next(part for part in parts if column in part.schema.names)
        for part in parts:
            if column not in part.schema.names:
                raise UserError(
                    f"{part.name} has no column {column!r}, {owner.name} has; give files with the "
                    "same columns"
                )
    for part in parts:
        kind = part.schema.field(image).type
        if target is not None and not _holds_numbers(part.schema.field(target).type):
            raise UserError(
                f"column {target} of {part.name} holds {part.schema.field(target).type}, neither "
                "numbers nor lists of them; name another with --target"
            )
        if not holds_images(kind):
            raise UserError(
                f"column {image} of {part.name} holds {kind}, not encoded images; name another "
                "with --image-column"
            )
    classes = [
        None if label is None else _class_names(part, feature.get(label))
        for part, feature in zip(parts, features, strict=True)
    ]
    return Columns(image, label, split, classes, target)


def _label_beside(
    target: str, label: str | None, names: Sequence[str], by_type: Sequence[str], path: Path
) -> str | None:
    """The label column of a table with targets: the one asked for, or that can be told, or none."""
    if target not in names:
        raise UserError(
            f"{path} has no column {target!r}; name one of {', '.join(names)} with --target"
        )
    if label is not None:
        return _choose("label", label, names, by_type, _LABEL_COLUMNS, path)
    others = [name for name in names if name != target]
    by_type = [name for name in dict.fromkeys(by_type) if name != target]
    if len(by_type) == 1:
        return by_type[0]
    return next((name for name in _LABEL_COLUMNS if name in others), None)


def _holds_numbers(kind: pa.DataType) -> bool:
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(test(kind) for test in is_list):
        kind = kind.value_type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def target_bytes(tables: Sequence[pa.Table], column: str) -> tuple[list[bytes], dict[int, str]]:
    """The numbers of each row, as float32 bytes, and what is wrong with rows that have none."""
    found, odd = list[bytes](), dict[int, str]()
    for table in tables:
        for value in table[column].to_pylist():
            try:
                found.append(b"" if value is None else encode_target(value))
            except ValueError as error:
                odd[len(found)] = f"{column}: {error}"
                found.append(b"")
    _, lacking = join_targets(found)
    empty = {i: f"no {column}" for i, numbers in enumerate(found) if not numbers}
    return found, dict(lacking) | empty | odd


def _features(part: Part) -> dict[str, Any]:
    """What the `datasets` library notes of each column."""
    text = (part.schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        info = parse_json(text).get("info") or {}
        features = info.get("features") or {}
        return dict(features.items())
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"the metadata `huggingface` of {part.name} cannot be read: {error}; write the file "
            "anew"
        ) from None


def _is_class_label(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel"


def _class_names(part: Part, feature: Any) -> tuple[str, ...] | None:
    names = feature.get("names") if _is_class_label(feature) else None
    noted = (part.schema.metadata or {}).get(b"class_names")
    if names is None and noted is not None:
        names = noted.decode("utf-8", "replace").split(",")
    if not names:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"the class names of {part.name} are no list of texts; write it anew")
    return tuple(map(printable, names))


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold encoded images."""
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_binary(kind.field(at).type)
    return _is_binary(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _is_binary(kind: pa.DataType) -> bool:
    is_kind = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in is_kind)


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
        only = list(dict.fromkeys(by_type))
        found = only if len(only) == 1 else [n for n in by_name if n in names]
        if found and (what == "label" or found[0] in by_type):
            return found[0]
    elif given in names:
        return given
    raise UserError(
        f"{path} has no {what} column{f' {given!r}' if given else ' that can be told by itself'}; "
        f"name one of {', '.join(names)} with --{what}-column"
        + (", or numbers to learn with --target" if what == "label" else "")
    )


def known_split(name: str | None, path: Path | str) -> str:
    """train, val or test from what people call it."""
    if name is None or name.lower() not in SPLIT_NAMES:
        raise UserError(
            f"{path} has a split {name!r}; known are {', '.join(SPLIT_NAMES)}; rename or remove it"
        )
    return SPLIT_NAMES[name.lower()]


def own_splits(tables: Sequence[pa.Table], column: str, path: Path) -> list[str]:
    """The split of each row, by the column that tells it."""
    texts = [_text(table[column]) for table in tables]
    known = {s: known_split(s, path) for text in texts for s in text.unique().to_pylist()}
    return [known[s] for text in texts for s in text.to_pylist()]


def number_labels(
    parts: Sequence[Part], columns: Columns, values: Sequence[pa.ChunkedArray], path: Path
) -> tuple[list[Labels], tuple[str, ...]]:
    """Class numbers of each file, and the names that they number.

    Text counts by name, a number by the names in its own file. Files whose numbers cannot be
    compared, since they name other classes or none, are refused with both their names.
    """
    texts = [_is_text(column.type) for column in values]
    numbers = [
        None if text else _numbers(part, columns, i, values[i])
        for i, (part, text) in enumerate(zip(parts, texts, strict=True))
    ]
    # A file without any label says nothing of the classes, unless it names them.
    named = [i for i, names in enumerate(columns.classes) if names and not texts[i]]
    bare = [i for i, n in enumerate(numbers) if n is not None and i not in named and (n >= 0).any()]
    written = [i for i, text in enumerate(texts) if text]
    if written and bare:
        raise UserError(
            f"column {columns.label} holds names in {parts[written[0]].name}, but numbers without "
            f"names in {parts[bare[0]].name}; give one or the other in all files"
        )
    if named:
        classes = columns.classes[named[0]] or ()
        _check_names(parts, columns, named, bare)
    elif written:
        unique = {n for i in written for n in _text(values[i]).unique().to_pylist()}
        classes = tuple(sorted(unique - {None}))
    else:
        highest = max((int(n.max(initial=-1)) for n in numbers if n is not None), default=-1)
        classes = tuple(map(str, range(highest + 1)))
    labels = []
    for i, own in enumerate(numbers):
        if own is None:
            labels.append(
                _by_name(parts[i], values[i], classes, parts[named[0]] if named else None)
            )
            continue
        if named and own.max(initial=-1) >= len(classes):
            raise UserError(
                f"{parts[i].name} has the label {own.max()}, but {parts[named[0]].name} names "
                f"{len(classes)} classes; give both files the same class names"
            )
        names = columns.classes[i]
        if i in named and names is not None and names != classes:
            own = np.array([*map(classes.index, names), -1], np.int32)[own]
        labels.append(own)
    if not any((label >= 0).any() for label in labels):
        raise UserError(
            f"{path}: no row has a label in column {columns.label}; name another with "
            "--label-column"
        )
    return labels, tuple(map(printable, classes))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_kind = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in is_kind)


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """As large_string: together, the text of a column may be longer than 2 GB."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_string())


def _numbers(part: Part, columns: Columns, i: int, column: pa.ChunkedArray) -> Labels:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise UserError(
            f"{part.name}: column {columns.label} holds {kind}, not class numbers or names; name "
            "another with --label-column"
        )
    if pa.types.is_dictionary(column.type):
        column = column.cast(kind)
    names = columns.classes[i]
    limit = len(names) if names else MAX_UNNAMED
    if pa.types.is_null(kind):
        return np.full(len(column), -1, np.int32)
    low, high = pc.min_max(column).as_py().values()
    if high is not None and not (low >= -1 and high < limit):
        raise UserError(
            f"{part.name}: the {'highest' if high >= limit else 'lowest'} value in column "
            f"{columns.label} is {high if high >= limit else low}; class numbers here go from 0 "
            f"to {limit - 1}, and -1 is no label; name another column with --label-column"
        )
    return np.asarray(column.cast(pa.int32()).fill_null(-1).to_numpy(), np.int32)


def _by_name(
    part: Part, column: pa.ChunkedArray, classes: Sequence[str], named: Part | None
) -> Labels:
    place = {name: number for number, name in enumerate(classes)}
    text = _text(column)
    found = [name for name in text.unique().to_pylist() if name is not None]
    if named is not None:  # its names are printable
        place = {name: place.get(printable(name), -1) for name in found}
        if unknown := [name for name in found if place[name] < 0]:
            raise UserError(
                f"{part.name} has the class {min(unknown)!r}, which {named.name} does not name; "
                "give both files the same class names"
            )
    numbers = pc.index_in(text, pa.array(found, pa.large_string())).fill_null(len(found))
    return np.array([*(place[name] for name in found), -1], np.int32)[numbers.to_numpy()]


def _check_names(
    parts: Sequence[Part], columns: Columns, named: Sequence[int], bare: Sequence[int]
) -> None:
    """Refuse files whose names are not those of the first that has names."""
    first = named[0]
    names = columns.classes[first] or ()
    for i in named[1:]:
        own = columns.classes[i] or ()
        if own == names:
            continue
        if sorted(own) != sorted(names) or len(set(own)) < len(own):
            raise UserError(_differ(parts[first], parts[i], names, own))
        if bare:
            raise UserError(
                f"{parts[bare[0]].name} has class numbers without names, and {parts[first].name} "
                f"and {parts[i].name} name the classes in different orders; give it names"
            )


def _differ(one: Part, other: Part, names: Sequence[str], own: Sequence[str]) -> str:
    said = [
        f"{part.name} names {_some(sorted(set(a) - set(b)))}"
        for part, a, b in ((one, names, own), (other, own, names))
        if set(a) - set(b)
    ]
    return (
        f"the classes of {one.name} and {other.name} differ: only {', only '.join(said)}; where "
        "these are two data sets (configurations), give the path of one of them, else give both "
        "files the same class names"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if names[5:] else "")
