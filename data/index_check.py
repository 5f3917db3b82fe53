"""Whether what an index says can be true: its manifest, and its columns against the manifest.

An index may come from a bucket or from another machine. Its hashes show that nobody changed it
since it was written, not that what was written makes sense.
"""

import os
import re
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from bigbatch.data.targets import MOST

FORMAT = 1
COLUMNS: dict[str, type[np.generic]] = {
    "shard": np.uint32,
    "offset": np.uint64,
    "size": np.uint32,
    "label": np.int32,
    "crc": np.uint32,
    "class_starts": np.int64,
    "class_members": np.uint32,
}
TARGET = "target"  # of indexes whose manifest says `targets`, how many numbers a sample has
MAX_MANIFEST_BYTES = 1 << 30
_FIELDS = {"format", "samples", "classes", "shards", "problems", "columns", "hash"}
_OPTIONAL = {"passed_over", "targets"}  # {what: how many}; numbers of a sample's target
_SHARD_FIELDS = {"name", "bytes", "samples"}
_MOST_SAMPLES = 1 << 32  # class_members are uint32
_MOST_BYTES = 1 << 63  # a file's offset is a signed number of 64 bits
# As find_shards lists them: the name of a file in the folder, and nothing that leads elsewhere.
_SHARD_NAME = re.compile(r"[^./\x00-\x1f\x7f][^/\x00-\x1f\x7f]*\.tar", re.IGNORECASE)
_LONGEST_NAME = 255  # bytes
_CHUNK = 1 << 20  # samples that are looked at together

Columns = Mapping[str, npt.NDArray[Any]]


def check_manifest(manifest: Any) -> None:
    """Raise ValueError unless a manifest has exactly the known fields, with possible values.

    Looks at all of it, and at no column: names, numbers, and that the shards' samples add up.
    """
    _expect(isinstance(manifest, dict), "it is no mapping")
    _fields(manifest, _FIELDS, "it", _OPTIONAL)
    _expect(manifest["format"] == FORMAT, f"its format is {manifest['format']!r:.40}")
    samples = manifest["samples"]
    _expect(_is_count(samples, _MOST_SAMPLES) and samples > 0, f"samples = {samples!r:.40}")
    for name in ("classes", "problems"):
        texts = manifest[name]
        good = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        _expect(good, f"{name} is no list of texts")
    counts = manifest.get("passed_over", {})
    good = isinstance(counts, dict) and all(_is_count(n, _MOST_BYTES) for n in counts.values())
    _expect(good, "passed_over holds what is no count")
    _expect(len(manifest["classes"]) > 0, "it names no class")
    width = manifest.get("targets", 1)
    _expect(_is_count(width, MOST + 1) and width > 0, f"targets = {width!r:.40}")
    columns = manifest["columns"]
    _expect(isinstance(columns, dict), "columns is no mapping")
    _fields(columns, set(columns_of(manifest)), "columns")
    good = all(isinstance(d, str) and re.fullmatch("[0-9a-f]{64}", d) for d in columns.values())
    _expect(good, "columns holds what is no SHA-256")
    _expect(isinstance(manifest["hash"], str), "hash is no text")
    _check_shards(manifest["shards"], samples)


def columns_of(manifest: Mapping[str, Any]) -> dict[str, type[np.generic]]:
    """The columns of an index, each with its dtype."""
    return {**COLUMNS, TARGET: np.float32} if "targets" in manifest else COLUMNS


def shape_of(column: str, manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape that a manifest gives a column."""
    if column == "class_starts":
        return (len(manifest["classes"]) + 1,)
    rows: int = manifest["samples"]
    return (rows, manifest["targets"]) if column == TARGET else (rows,)


def _check_shards(shards: Any, samples: int) -> None:
    _expect(isinstance(shards, list) and len(shards) > 0, "shards is no list of archives")
    total, names = 0, set()
    for shard in shards:
        _expect(isinstance(shard, dict), "a shard is no mapping")
        _fields(shard, _SHARD_FIELDS, "a shard")
        name = shard["name"]
        check_shard_name(name)
        names.add(name)
        _expect(_is_count(shard["bytes"], _MOST_BYTES), f"{name} has {shard['bytes']!r:.40} bytes")
        count = shard["samples"]
        _expect(_is_count(count, _MOST_SAMPLES), f"{name} has {count!r:.40} samples")
        total += count
    _expect(len(names) == len(shards), "two shards have the same name")
    _expect(total == samples, f"its shards hold {total:,} samples, it says {samples:,}")


def check_shard_name(name: Any) -> None:
    """Raise ValueError unless `name` is a file's name that find_shards would list."""
    good = isinstance(name, str) and _SHARD_NAME.fullmatch(name) is not None
    good = good and len(os.fsencode(name)) <= _LONGEST_NAME
    _expect(good, f"{name!a:.120} is no name of a shard: NAME.tar in the folder itself")


def check_class_starts(columns: Columns, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError unless the class lists follow on each other and cover all samples."""
    starts = columns["class_starts"]
    good = (
        starts[0] == 0 and starts[-1] == manifest["samples"] and bool((np.diff(starts) >= 0).all())
    )
    _expect(good, "class_starts are no places of class lists")


def check_columns(columns: Columns, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError unless every sample lies in its shard and in its class's list.

    Reads all columns, some 30 bytes a sample, a million samples at a time.
    """
    check_class_starts(columns, manifest)
    shards = manifest["shards"]
    lengths = np.array([shard["bytes"] for shard in shards], np.uint64)
    samples, classes = manifest["samples"], len(manifest["classes"])
    in_shard, in_class = np.zeros(len(shards), np.int64), np.zeros(classes, np.int64)
    last = 0
    for start in range(0, samples, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        shard, label = columns["shard"][chunk], columns["label"][chunk]
        offset, size = columns["offset"][chunk], columns["size"][chunk]
        _expect(int(shard.max()) < len(shards), f"shard {shard.max()} of {len(shards):,}")
        _expect(shard[0] >= last and bool((shard[1:] >= shard[:-1]).all()), "shards are mixed")
        last = shard[-1]
        bad = label[(label < 0) | (label >= classes)]
        _expect(not len(bad), f"label {bad[:1]} of {classes:,} classes")
        # Not offset + size, which may be more than 64 bits hold.
        length = lengths[shard]
        inside = (offset <= length) & (size <= length - np.minimum(offset, length))
        where = start + int(np.argmin(inside))
        _expect(bool(inside.all()), f"sample {where:,} reaches beyond the end of its shard")
        if TARGET in columns:
            finite = np.isfinite(columns[TARGET][chunk]).all(1)
            where = start + int(np.argmin(finite))
            _expect(bool(finite.all()), f"the target of sample {where:,} is not finite")
        in_shard += np.bincount(shard, minlength=len(shards))
        in_class += np.bincount(label, minlength=classes)
    told = np.array([shard["samples"] for shard in shards], np.int64)
    _expect(bool((in_shard == told).all()), "shards hold other numbers of samples than it says")
    counts = np.diff(columns["class_starts"])
    _expect(bool((in_class == counts).all()), "class lists have other lengths than classes")
    _check_members(columns, samples)


def _check_members(columns: Columns, samples: int) -> None:
    """Each class's list holds its own samples, ascending: with equal counts, all of them."""
    starts, labels = columns["class_starts"], columns["label"]
    for start in range(0, samples, _CHUNK):
        stop = min(start + _CHUNK, samples)
        members = columns["class_members"][start:stop]
        _expect(int(members.max()) < samples, f"class_members holds sample {members.max():,}")
        first = int(np.searchsorted(starts, start, "right")) - 1
        last = int(np.searchsorted(starts, stop, "left"))
        edges = np.clip(starts[first : last + 1], start, stop)
        classes = np.repeat(np.arange(first, last), np.diff(edges))
        _expect(bool((labels[members] == classes).all()), "a class's list holds another's sample")
        # Samples of a list ascend, across the edge of the chunk too; other places are starts.
        before = columns["class_members"][max(0, start - 1) : stop]
        places = np.arange(max(1, start), stop)
        falls = places[before[1:] <= before[:-1]] if len(before) > 1 else places[:0]
        _expect(bool(np.isin(falls, starts).all()), "a class's list holds a sample twice")


def _is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _fields(
    mapping: dict[str, Any], known: set[str], what: str, optional: Set[str] = frozenset()
) -> None:
    if lacking := known - mapping.keys():
        raise ValueError(f"{what} has no {sorted(lacking)[0]}")
    if odd := mapping.keys() - known - optional:
        shown = [f"{name!a:.60}" for name in sorted(odd)[:3]]
        raise ValueError(f"{what} has {', '.join(shown)}, which no index has")


def _expect(good: bool, problem: str) -> None:
    if not good:
        raise ValueError(problem)
