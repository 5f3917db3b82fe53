"""The index of a folder of shards: which sample lies where, with which label.

    SPLIT/000000.tar ...    SPLIT/index/{manifest.json, keys.parquet, *.npy}

Training reads images by `pread` and never parses a tar header. An index is immutable: it is
replaced, never edited (data/index_files.py).
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from google_crc32c import value as crc32c

from bigbatch.configs.errors import Changed, UserError
from bigbatch.data.classes import UNLABELLED, read_classes
from bigbatch.data.energon import one_part_only
from bigbatch.data.index_check import columns_of
from bigbatch.data.index_files import (
    consistently,
    is_read_at_open,
    read_columns,
    read_keys,
    read_manifest,
    verify_columns,
    verify_keys,
    write_files,
)
from bigbatch.data.pool import map_all
from bigbatch.data.rng import uniforms
from bigbatch.data.samples import Scan, scan_shard
from bigbatch.data.splits import one_split_only
from bigbatch.data.staging import Remote
from bigbatch.data.tar import compressed
from bigbatch.data.targets import Targets, join_targets

_SHOWN_PROBLEMS = 20
MAX_UNNAMED = 1 << 20  # classes that no classes.txt names: a larger label is no class number
OURS = ("classes.txt", "skipped.txt")  # files that `bigbatch shard` writes beside or above shards


class BadShards(UserError):
    """Shards with problems, which were not indexed."""


@dataclass(frozen=True)
class ShardFile:
    """One archive: its file name, its size on disk, and how many samples it holds."""

    name: str
    bytes: int
    samples: int


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of one split, N of them in C classes.

    Sample i is the bytes [offset[i], offset[i] + size[i]) of shards[shard[i]], an encoded
    image of class label[i]; crc[i] is their CRC-32C, and target[i] what numbers it stands for,
    where samples have any. class_members[class_starts[c] :
    class_starts[c + 1]] are the samples of class c, ascending. Arrays are memory-mapped and
    read-only. `problems` and `passed_over` say what was left out when it was made. `hash`
    identifies the rest, shard sizes and class names included.
    """

    root: Path
    shard: npt.NDArray[np.uint32]
    offset: npt.NDArray[np.uint64]
    size: npt.NDArray[np.uint32]
    label: npt.NDArray[np.int32]
    crc: npt.NDArray[np.uint32]
    class_starts: npt.NDArray[np.int64]
    class_members: npt.NDArray[np.uint32]
    classes: tuple[str, ...]
    shards: tuple[ShardFile, ...]
    problems: tuple[str, ...]
    passed_over: dict[str, int]
    hash: str
    remote: Remote | None = None  # where the shards are, if not in `root`
    loose: bool = False  # the "shards" are image files, of which no CRC is known
    target: Targets | None = None  # [N, K]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def class_counts(self) -> npt.NDArray[np.int64]:
        """Samples of each class, int64 [C]."""
        return np.diff(self.class_starts)

    @property
    def place(self) -> str:
        """Where the shards are: a folder, or a URL."""
        return self.remote.url if self.remote else str(self.root)

    def keys(self) -> list[str]:
        """The sample keys, in index order. Read from disk on every call."""

        def read() -> list[str]:
            _same_manifest(self)
            return read_keys(self.root, len(self))

        return consistently(self.root, read)


def some_samples(index: Index, samples: npt.NDArray[np.int64]) -> Index:
    """Samples of an index, in this order, to read; its lists of classes stay those of the whole."""
    columns = ["shard", "offset", "size", "label", "crc"]
    columns += [] if index.target is None else ["target"]
    return replace(index, **{name: getattr(index, name)[samples] for name in columns})


def draw_samples(index: Index, count: int, *key: int | str) -> Index:
    """`count` samples, or all there are, in their order; which ones follows from the key alone."""
    drawn = uniforms((len(index),), *key)
    return some_samples(index, np.sort(np.argsort(drawn, kind="stable")[:count]))


def open_index(root: Path, remote: Remote | None = None) -> Index:
    """Open the index of `root`, a folder of shards.

    Fast: looks at the manifest, at columns of up to five million samples, at the size of each
    shard and at one image of the first and of the last shard; verify_index reads larger
    columns, and the other images are checked as they are read. Raises UserError where there is
    no index, it is damaged, or the shards are not those that it was made from. The shards of a
    `remote` folder are not looked at; data/remote.py opens those.
    """
    root = Path(root)
    if not (root / "index").is_dir() and remote is None:
        find_shards(root)
    index = consistently(root, lambda: _open(root, remote))
    if remote is None:
        _check_shards(index)
    return index


def _open(root: Path, remote: Remote | None) -> Index:
    manifest = read_manifest(root)
    columns: dict[str, Any] = read_columns(root, manifest)
    return Index(
        root=root,
        classes=tuple(manifest["classes"]),
        shards=tuple(ShardFile(**s) for s in manifest["shards"]),
        problems=tuple(manifest["problems"]),
        passed_over=dict(manifest.get("passed_over", {})),
        hash=manifest["hash"],
        remote=remote,
        **columns,
    )


def verify_index(index: Index) -> None:
    """Read all columns and keys; UserError where one is damaged or cannot be true."""

    def read() -> None:
        manifest = _same_manifest(index)
        if not is_read_at_open({name: getattr(index, name) for name in columns_of(manifest)}):
            verify_columns(index.root, manifest)
        verify_keys(index.root, len(index))

    consistently(index.root, read)


def _same_manifest(index: Index) -> dict[str, Any]:
    manifest = read_manifest(index.root)
    if manifest["hash"] != index.hash:
        raise UserError(f"the index of {index.root} was replaced meanwhile; start again")
    return manifest


def _check_shards(index: Index) -> None:
    """Raise UserError where the shards are not those that were indexed, as far as is quick."""
    root, shards = index.root, index.shards
    remedy = f"restore it, or run `bigbatch index {root}`"
    for file in shards:
        try:
            size = (root / file.name).stat().st_size
        except OSError as error:
            raise UserError(
                f"shard {root / file.name} cannot be read ({error}); {remedy}"
            ) from None
        if size != file.bytes:
            raise Changed(
                f"shard {root / file.name} has {size:,} bytes; it had {file.bytes:,} when it was "
                f"indexed; {remedy}"
            )
    for sample in {0, len(index) - 1}:
        if not check_sample(index, sample):
            raise Changed(
                f"shard {root / shards[index.shard[sample]].name} at byte "
                f"{index.offset[sample]:,} is not what was indexed: the index of another data set, "
                f"or a changed shard; {remedy}"
            )


def check_sample(index: Index, sample: int) -> bool:
    """Whether the bytes of one sample are those that were indexed."""
    path = index.root / index.shards[index.shard[sample]].name
    with path.open("rb") as file:
        data = os.pread(file.fileno(), int(index.size[sample]), int(index.offset[sample]))
    return len(data) == index.size[sample] and crc32c(data) == index.crc[sample]


def build_index(
    root: Path,
    *,
    classes: Sequence[str] | None = None,
    workers: int = 1,
    skip_bad: bool = False,
) -> Index:
    """Index the WebDataset archives ``*.tar`` in `root`, replacing an index that is there.

    `classes` names the classes by number; without it, the lines of classes.txt in `root` or
    in the folder above it, or else the numbers themselves. `workers` processes scan shards.

    Any problem (damaged archive, duplicate key, missing or impossible label or target, either
    without an image) raises BadShards with all of them and leaves the old index as it was. With
    `skip_bad`, samples with a problem are left out, and the problems are kept in the index. So is
    a count of what is passed over: members that are no part of a sample, and files beside the
    archives.
    """
    root = Path(root)
    paths = find_shards(root)
    if classes is None:  # not what `bigbatch shard` has just written, perhaps below such a folder
        one_part_only(paths)
    shards = [path.name for path in paths]
    one_split_only(shards, str(root))
    names = tuple(classes) if classes is not None else read_classes(root)
    scans = scan_shards(paths, workers)
    write_index(root, shards, scans, names, skip_bad, str(root), _beside(root))
    return open_index(root)


def write_index(
    root: Path,
    shards: Sequence[str],
    scans: Sequence[Scan],
    names: Sequence[str] | None,
    skip_bad: bool,
    place: str,
    beside: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Write root/index from what was found in `shards`, which are at `place`.

    `beside` counts the files there that are no shards. Raises BadShards with all problems;
    build_index says which.
    """
    keys = pa.array([key for scan in scans for key in scan.keys], pa.string())
    columns: dict[str, npt.NDArray[Any]] = {
        "shard": np.repeat(np.arange(len(scans)), [len(s.keys) for s in scans]),
        "offset": _concatenate([s.offsets for s in scans]),
        "size": _concatenate([s.sizes for s in scans]),
        "label": _concatenate([s.labels for s in scans]),
        "crc": _concatenate([s.crcs for s in scans]),
    }
    problems = [f"{where}: {what}" for scan in scans for where, what in scan.problems]
    target, lacking = join_targets([numbers for scan in scans for numbers in scan.targets])
    labels = np.delete(columns["label"], [i for i, _ in lacking])
    if target is not None and (labels < 0).all() and len(names or UNLABELLED) == 1:
        names, columns["label"] = names or UNLABELLED, np.zeros(len(keys), np.int64)
    lacking += [(int(i), "has no label") for i in np.flatnonzero(columns["label"] < 0)]
    bad = _duplicates(keys)
    problems += [
        _describe(i, "has the key of an earlier one", columns, shards, keys) for i in bad.tolist()
    ]
    limit = MAX_UNNAMED if names is None else len(names)
    told = f"{limit:,} that there may be without a classes.txt" if names is None else limit
    unknown = np.flatnonzero(columns["label"] >= limit)
    for i in unknown.tolist():
        problem = f"has label {columns['label'][i]}, beyond the {told} classes"
        problems.append(_describe(i, problem, columns, shards, keys))
    problems += [_describe(i, what, columns, shards, keys) for i, what in lacking]
    bad = np.union1d(np.union1d(bad, unknown), np.array([i for i, _ in lacking], np.int64))
    if problems and not skip_bad:
        shown = "\n".join(f"  {p}" for p in problems[:_SHOWN_PROBLEMS])
        more = len(problems) - _SHOWN_PROBLEMS
        raise BadShards(
            f"{place} was not indexed; {len(problems):,} found wrong:\n{shown}\n"
            + (f"  and {more:,} more\n" if more > 0 else "")
            + "mend the shards, or leave these samples out with --skip-bad"
        )
    good = np.ones(len(keys), bool)
    good[bad] = False
    if not good.any():
        raise UserError(f"{place} holds no sample: an image and a label (.cls) with the same name")
    columns |= {} if target is None else {"target": target}
    columns = {name: column[good] for name, column in columns.items()}
    labels = columns["label"]
    if names is None:
        names = tuple(map(str, range(int(labels.max()) + 1)))
    columns["class_starts"] = np.cumsum([0, *np.bincount(labels, minlength=len(names))])
    columns["class_members"] = np.argsort(labels, kind="stable")
    samples = np.bincount(columns["shard"].astype(np.int64), minlength=len(shards))
    files = [
        ShardFile(name, scan.bytes, int(n))
        for name, scan, n in zip(shards, scans, samples, strict=True)
    ]
    manifest = {
        "samples": len(labels),
        "classes": list(names),
        "shards": [asdict(file) for file in files],
        "problems": problems,
        "passed_over": members_passed_over(scans) | dict(beside),
        "targets": 0 if target is None else target.shape[1],
    }
    for optional in ("passed_over", "targets"):
        if not manifest[optional]:
            del manifest[optional]
    write_files(root, columns, keys.filter(pa.array(good)), manifest)


def find_shards(root: Path) -> list[Path]:
    """The archives of a folder, sorted by name; UserError where there are none."""
    below = root.iterdir() if root.is_dir() else iter(())
    paths = sorted(p for p in below if is_shard(p.name) and p.is_file())
    if paths:
        return paths
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the folder that holds the *.tar shards")
    folders = sorted({str(p.parent) for p in root.glob("*/*") if is_shard(p.name)})
    hint = "give the folder that holds them"
    if folders:
        hint = f"did you mean {' or '.join(folders[:3])}?"
    raise UserError(f"{root} holds no *.tar shards{compressed(root)}; {hint}")


def is_shard(name: str) -> bool:
    return name.lower().endswith(".tar") and not name.startswith(".")


def _beside(root: Path) -> dict[str, int]:
    """How many files of each extension lie beside the shards, and tars in folders below them."""
    found = Counter[str]()
    for path in sorted(root.iterdir()):
        if path.name.startswith("index.tmp-"):
            continue  # of another writer, which may be gone by the next line
        if path.is_dir():
            below = sum(is_shard(p.name) for p in path.iterdir()) if path.name[0] != "." else 0
            found[f"tars in {path.name}/"] += below
        elif not is_shard(path.name):
            found[f"files {path.suffix.lower() or 'without extension'}"] += path.name not in OURS
        elif not path.is_file():
            found["links to files that are missing"] += 1
    return {what: count for what, count in found.items() if count}


def members_passed_over(scans: Sequence[Scan]) -> dict[str, int]:
    """How many members of all archives are no part of a sample, by what they are."""
    found = sum((scan.passed_over for scan in scans), Counter[str]())
    return {f"members {what}": count for what, count in sorted(found.items())}


def scan_shards(
    paths: Sequence[Path],
    workers: int,
    label_key: str | None = None,
    unlabelled: bool = False,
    target_key: str | None = None,
) -> list[Scan]:
    """`scan_shard` of archives, in several processes where `workers` > 1; in the order given."""
    scan = partial(scan_shard, label_key=label_key, unlabelled=unlabelled, target_key=target_key)
    if workers <= 1 or len(paths) == 1:
        return [scan(path) for path in paths]
    return map_all(scan, paths, workers)


def _concatenate(lists: list[list[int]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.array(x, np.int64) for x in lists])


def _duplicates(keys: pa.StringArray) -> npt.NDArray[np.int64]:
    """Positions of all samples whose key an earlier sample has."""
    if pc.count_distinct(keys).as_py() == len(keys):
        return np.empty(0, np.int64)
    codes = keys.dictionary_encode().indices.to_numpy()
    first = np.unique(codes, return_index=True)[1]
    return np.setdiff1d(np.arange(len(keys)), first)


def _describe(
    sample: int,
    problem: str,
    columns: dict[str, npt.NDArray[Any]],
    shards: Sequence[str],
    keys: pa.StringArray,
) -> str:
    shard = shards[columns["shard"][sample]]
    offset = columns["offset"][sample]
    return f"{shard} at byte {offset:,}: sample {keys[sample].as_py()!r} {problem}"
