"""The index of a folder of shards: which sample lies where, with which label.

    SPLIT/000000.tar ...    SPLIT/index/{manifest.json, keys.parquet, *.npy}

Columns are NumPy files, memory-mapped, 28 bytes a sample in all; training reads images by
`pread` and never parses a tar header. An index is immutable: it is replaced, never edited.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from google_crc32c import value as crc32c

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import sync
from bigbatch.data.pool import map_all
from bigbatch.data.staging import Remote
from bigbatch.data.tar import Scan, scan_shard

FORMAT = 1
_COLUMNS = {
    "shard": np.uint32,
    "offset": np.uint64,
    "size": np.uint32,
    "label": np.int32,
    "crc": np.uint32,
    "class_starts": np.int64,
    "class_members": np.uint32,
}
# Opening hashes columns up to this many bytes together (about five million samples, a
# tenth of a second); `bigbatch inspect` checks larger ones.
_HASH_AT_OPEN = 128 << 20
_SHOWN_PROBLEMS = 20
_REMAKE = "make it again with `bigbatch index"


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
    image of class label[i]; crc[i] is their CRC-32C. class_members[class_starts[c] :
    class_starts[c + 1]] are the samples of class c, ascending. Arrays are memory-mapped and
    read-only. `hash` identifies all of this, shard sizes and class names included.
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
    hash: str
    remote: Remote | None = None  # where the shards are, if not in `root`

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
        path = self.root / "index" / "keys.parquet"
        try:
            keys: list[str] = pq.read_table(path, columns=["key"])["key"].to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is damaged ({error}); {_REMAKE} {self.root}`") from None
        return keys

    def __reduce__(self) -> tuple[Callable[..., "Index"], tuple[Path, Remote | None]]:
        # Another process maps the same files; a pickled array would be a copy in memory.
        return open_index, (self.root, self.remote)


def open_index(root: Path, remote: Remote | None = None) -> Index:
    """Open the index of `root`, a folder of shards.

    Fast: looks at the size of each shard and at one image of the first and of the last
    shard; the other images are checked as they are read. Raises UserError where there is no
    index, it is damaged, or the shards are not those that it was made from. The shards of a
    `remote` folder are not looked at; data/remote.py opens those.
    """
    root = Path(root)
    manifest = _read_manifest(root)
    columns = {name: _open_column(root, manifest, name) for name in _COLUMNS}
    if sum(column.nbytes for column in columns.values()) <= _HASH_AT_OPEN:
        verify_columns(root)
    index = Index(
        root=root,
        classes=tuple(manifest["classes"]),
        shards=tuple(ShardFile(**s) for s in manifest["shards"]),
        problems=tuple(manifest["problems"]),
        hash=manifest["hash"],
        remote=remote,
        **columns,
    )
    if remote is None:
        _check_shards(index)
    return index


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
            raise UserError(
                f"shard {root / file.name} has {size:,} bytes; it had {file.bytes:,} when it was "
                f"indexed; {remedy}"
            )
    for sample in {0, len(index) - 1}:
        if not check_sample(index, sample):
            raise UserError(
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

    Any problem (damaged archive, duplicate key, missing or impossible label) raises
    UserError with all of them and leaves the old index as it was. With `skip_bad`, samples
    with a problem are left out, and the problems are kept in the index.
    """
    root = Path(root)
    paths = find_shards(root)
    names = tuple(classes) if classes is not None else read_classes(root)
    shards = [path.name for path in paths]
    write_index(root, shards, scan_shards(paths, workers), names, skip_bad, str(root))
    return open_index(root)


def write_index(
    root: Path,
    shards: Sequence[str],
    scans: Sequence[Scan],
    names: Sequence[str] | None,
    skip_bad: bool,
    place: str,
) -> None:
    """Write root/index from what was found in `shards`, which are at `place`.

    Raises UserError with all problems; build_index says which.
    """
    keys = pa.array([key for scan in scans for key in scan.keys], pa.string())
    columns = {
        "shard": np.repeat(np.arange(len(scans)), [len(s.keys) for s in scans]),
        "offset": _concatenate([s.offsets for s in scans]),
        "size": _concatenate([s.sizes for s in scans]),
        "label": _concatenate([s.labels for s in scans]),
        "crc": _concatenate([s.crcs for s in scans]),
    }
    problems = [problem for scan in scans for problem in scan.problems]
    bad = _duplicates(keys)
    problems += [
        _describe(i, "has the key of an earlier one", columns, shards, keys) for i in bad.tolist()
    ]
    if names is not None:
        unknown = np.flatnonzero(columns["label"] >= len(names))
        problems += [
            _describe(
                i,
                f"has label {columns['label'][i]}, beyond the {len(names)} classes",
                columns,
                shards,
                keys,
            )
            for i in unknown.tolist()
        ]
        bad = np.union1d(bad, unknown)
    if problems and not skip_bad:
        shown = "\n".join(f"  {p}" for p in problems[:_SHOWN_PROBLEMS])
        more = len(problems) - _SHOWN_PROBLEMS
        raise UserError(
            f"{place} was not indexed; {len(problems):,} found wrong:\n{shown}\n"
            + (f"  and {more:,} more\n" if more > 0 else "")
            + "mend the shards, or leave these samples out with --skip-bad"
        )
    good = np.ones(len(keys), bool)
    good[bad] = False
    if not good.any():
        raise UserError(f"{place} holds no sample: an image and a label (.cls) with the same name")
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
    _write(root, columns, keys.filter(pa.array(good)), names, files, problems)


def find_shards(root: Path) -> list[Path]:
    """The archives of a folder, sorted by name; UserError where there are none."""
    paths = sorted(p for p in root.glob("[!.]*.tar") if p.is_file())
    if paths:
        return paths
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the folder that holds the *.tar shards")
    below = sorted({str(p.parent) for p in root.glob("*/*.tar")})
    hint = f"did you mean {' or '.join(below[:3])}?" if below else "give the folder that holds them"
    raise UserError(f"{root} holds no *.tar shards; {hint}")


def scan_shards(paths: Sequence[Path], workers: int) -> list[Scan]:
    """Scan archives, with several processes where `workers` > 1; in the order given."""
    if workers <= 1 or len(paths) == 1:
        return [scan_shard(path) for path in paths]
    return map_all(scan_shard, paths, workers)


def read_classes(root: Path) -> tuple[str, ...] | None:
    """Class names, one a line, from classes.txt in `root` or the folder above it."""
    for path in (root / "classes.txt", root.resolve().parent / "classes.txt"):
        if path.is_file():
            return tuple(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    return None


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


def _write(
    root: Path,
    columns: dict[str, npt.NDArray[Any]],
    keys: pa.StringArray,
    classes: Sequence[str],
    shards: Sequence[ShardFile],
    problems: Sequence[str],
) -> None:
    """Write everything beside the old index, then put it in its place by rename."""
    folder = root / f"index.tmp-{os.getpid()}"
    try:
        for left_over in root.glob("index.tmp-*"):
            shutil.rmtree(left_over)
        folder.mkdir()
        for name, dtype in _COLUMNS.items():
            np.save(folder / f"{name}.npy", columns[name].astype(dtype))
        pq.write_table(pa.table({"key": keys}), folder / "keys.parquet")
        manifest = {
            "format": FORMAT,
            "samples": len(keys),
            "classes": list(classes),
            "shards": [asdict(s) for s in shards],
            "problems": list(problems),
            "columns": {name: _digest(folder / f"{name}.npy") for name in _COLUMNS},
        }
        manifest["hash"] = _hash(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*folder.iterdir(), folder):
            sync(path)
        old = root / f"index.tmp-old-{os.getpid()}"
        if (root / "index").exists():
            (root / "index").rename(old)
        folder.rename(root / "index")
        sync(root)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"cannot write the index of {root}: {error}") from None


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / "index" / "manifest.json"
    if not path.is_file():
        find_shards(root)
        raise UserError(f"{root} has no index; make it with `bigbatch index {root}`")
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path} has format {manifest['format']!r}; this version reads {FORMAT}; "
                f"{_REMAKE} {root}`"
            )
        if _hash(manifest) != manifest["hash"]:
            raise ValueError("its hash is not that of its contents")
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error}); {_REMAKE} {root}`") from None
    return manifest


def map_column(path: Path) -> npt.NDArray[Any]:
    """A column, memory-mapped for access here and there."""
    column: np.memmap[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    # Training looks at samples in random order. Where the system reads ahead (megabytes, on
    # some machines), the first micro-batch of a large index takes seconds instead of
    # milliseconds.
    column._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return np.asarray(column)  # np.memmap is slow to index


def _open_column(root: Path, manifest: dict[str, Any], name: str) -> npt.NDArray[Any]:
    path = root / "index" / f"{name}.npy"
    length = len(manifest["classes"]) + 1 if name == "class_starts" else manifest["samples"]
    try:
        column = map_column(path)
        if column.dtype != _COLUMNS[name] or column.shape != (length,):
            raise ValueError(f"it holds {column.dtype} {column.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); {_REMAKE} {root}`") from None
    return column


def verify_columns(root: Path) -> None:
    """Read all columns and compare their hashes with the manifest's; UserError where not."""
    digests = _read_manifest(root)["columns"]
    for name in _COLUMNS:
        path = root / "index" / f"{name}.npy"
        if _digest(path) != digests[name]:
            raise UserError(
                f"{path} is damaged (its hash is not the one in the manifest); {_REMAKE} {root}`"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(manifest: dict[str, Any]) -> str:
    """16 hex digits over the manifest: what the samples are, not how well they were found."""
    text = json.dumps(
        {k: v for k, v in manifest.items() if k not in ("hash", "problems")}, sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
