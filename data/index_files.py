"""An index on the disk: columns, their manifest, and how one index takes another's place.

    SPLIT/index/{manifest.json, keys.parquet, *.npy}

Columns are NumPy files, memory-mapped, 28 bytes a sample in all, and 4 for each number of a
target. An index is never edited. A new one is written beside it and changes places with it in one
step, so that a crash leaves one or the other; a reader that meets the change between two files
begins again.
"""

import ctypes
import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import sync, to_json
from bigbatch.configs.json_text import parse_json
from bigbatch.data.index_check import (
    FORMAT,
    MAX_MANIFEST_BYTES,
    check_class_starts,
    check_columns,
    check_manifest,
    columns_of,
    shape_of,
)

T = TypeVar("T")

# Opening reads columns up to this many bytes together (about five million samples, a few
# tenths of a second); `bigbatch check` and `inspect` read larger ones.
_READ_AT_OPEN = 128 << 20
_REMAKE = "make it again with `bigbatch index"
_TRIES = 20  # to read an index that is being replaced
_PAUSE_S = 0.05
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # renameat2(2)


def write_files(
    root: Path,
    columns: Mapping[str, npt.NDArray[Any]],
    keys: pa.StringArray,
    manifest: dict[str, Any],
) -> None:
    """Write root/index, in the place of one that is there; of several writers the last one wins.

    `manifest` is what it holds beside the format and the hashes. Raises UserError.
    """
    folder = root / f"index.tmp-{os.getpid()}-{socket.gethostname()}"
    try:
        for left_over in root.glob("index.tmp-*"):
            if left_over == folder or not _has_writer(left_over.name):
                shutil.rmtree(left_over, ignore_errors=True)
        folder.mkdir()
        dtypes = columns_of(manifest)
        for name, dtype in dtypes.items():
            np.save(folder / f"{name}.npy", columns[name].astype(dtype))
        pq.write_table(pa.table({"key": keys}), folder / "keys.parquet")
        digests = {name: _digest(folder / f"{name}.npy") for name in dtypes}
        manifest = {"format": FORMAT, **manifest, "columns": digests}
        manifest["hash"] = _hash(manifest)
        try:
            check_manifest(manifest)  # what no reader would take is not written
        except ValueError as error:
            raise UserError(f"{root} was not indexed: {error}; mend or rename it") from None
        (folder / "manifest.json").write_text(to_json(manifest, indent=1) + "\n")
        for path in (*folder.iterdir(), folder):
            sync(path)
        _replace(folder, root / "index")
        sync(root)
    except OSError as error:
        raise UserError(f"cannot write the index of {root}: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _has_writer(name: str) -> bool:
    """Whether a folder index.tmp-PID-HOST may belong to a process that lives."""
    found = re.fullmatch(r"index\.tmp-(\d+)-(.+)", name)
    return found is not None and (
        found[2] != socket.gethostname() or psutil.pid_exists(int(found[1]))
    )


def _replace(folder: Path, index: Path) -> None:
    """Give `folder` the name `index`; what had it is then called `folder`, or is gone."""
    while not _exchange(folder, index):
        # There is none yet, or the file system cannot exchange (NFS). Readers wait this out.
        old = folder.with_name(folder.name.replace("index.tmp-", "index.tmp-old-"))
        with suppress(FileNotFoundError):
            index.rename(old)
        try:
            folder.rename(index)
            break
        except OSError as error:  # another writer was faster
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where that cannot be."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    status: int = rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return status == 0


def consistently(root: Path, read: Callable[[], T]) -> T:
    """What `read` finds in root/index, all of it in one index, though another may replace it."""
    for left in reversed(range(_TRIES)):
        before = _identity(root)
        try:
            found = read()
        except UserError:
            moving = before is None and any(root.glob("index.tmp-old-*"))
            if left == 0 or (_identity(root) == before and not moving):
                raise
        else:
            if _identity(root) == before:
                return found
        time.sleep(_PAUSE_S)
    raise UserError(f"the index of {root} is replaced again and again; start when that is over")


def _identity(root: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        found = (root / "index").stat()
        return found.st_dev, found.st_ino
    return None


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest, checked as a whole; UserError where it is damaged or missing."""
    path = root / "index" / "manifest.json"
    if not path.is_file():
        raise UserError(f"{root} has no index; make it with `bigbatch index {root}`")
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"it is larger than {MAX_MANIFEST_BYTES:,} bytes")
        return parse_manifest(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path} {error}; {_REMAKE} {root}`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {_REMAKE} {root}`") from None


def parse_manifest(text: bytes) -> dict[str, Any]:
    """A manifest, checked as a whole and against its own hash.

    Raises UserError for another format, ValueError where it is damaged.
    """
    manifest: dict[str, Any] = parse_json(text)
    told = manifest.get("format") if isinstance(manifest, dict) else None
    if type(told) is int and told != FORMAT:
        raise UserError(f"has format {told}; this version reads {FORMAT}")
    check_manifest(manifest)
    if _hash(manifest) != manifest["hash"]:
        raise ValueError("its hash is not that of its contents")
    return manifest


def read_columns(root: Path, manifest: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """All columns, memory-mapped; UserError where one is damaged, as far as is quick.

    Small ones are checked in full, as by verify_columns; of large ones dtypes, lengths and
    where the lists of the classes begin.
    """
    columns = {name: _open_column(root, manifest, name) for name in columns_of(manifest)}
    if is_read_at_open(columns):
        verify_columns(root, manifest)
    try:
        check_class_starts(columns, manifest)
    except ValueError as error:
        raise _damaged(root, error) from None
    return columns


def is_read_at_open(columns: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Whether read_columns has checked columns of this size in full."""
    return sum(column.nbytes for column in columns.values()) <= _READ_AT_OPEN


def read_keys(root: Path, samples: int) -> list[str]:
    """The keys of all samples; UserError where they cannot be read, or are not so many."""
    return [key for keys in _keys(root, samples) for key in keys.to_pylist()]


def verify_keys(root: Path, samples: int) -> None:
    """Raise UserError where read_keys would, and hold a few of them at a time."""
    for _ in _keys(root, samples):
        pass


def _keys(root: Path, samples: int) -> Iterator[pa.StringArray]:
    path = root / "index" / "keys.parquet"
    found = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["key"]):
                keys = batch["key"]
                if keys.type != pa.string() or keys.null_count:
                    raise ValueError(f"{keys.null_count:,} of {len(keys):,} {keys.type} missing")
                keys.validate(full=True)
                found += len(keys)
                yield keys
        if found != samples:
            raise ValueError(f"{found:,} keys for {samples:,} samples")
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({error}); {_REMAKE} {root}`") from None


def verify_columns(root: Path, manifest: dict[str, Any]) -> None:
    """Read all columns: their hashes, and whether what they say can be true; or UserError."""
    columns = {}
    for name in columns_of(manifest):
        path = root / "index" / f"{name}.npy"
        try:
            digest = _digest(path)
        except OSError as error:
            raise UserError(f"{path} is damaged ({error}); {_REMAKE} {root}`") from None
        if digest != manifest["columns"][name]:
            raise UserError(
                f"{path} is damaged (its hash is not the one in the manifest); {_REMAKE} {root}`"
            )
        columns[name] = _open_column(root, manifest, name, mmap.MADV_SEQUENTIAL)
    try:
        check_columns(columns, manifest)
    except ValueError as error:
        raise _damaged(root, error) from None


def _damaged(root: Path, error: ValueError) -> UserError:
    return UserError(f"{root / 'index'} is damaged ({error}); {_REMAKE} {root}`")


def map_column(path: Path, advice: int = mmap.MADV_RANDOM) -> npt.NDArray[Any]:
    """A column, memory-mapped for access here and there. Raises OSError and ValueError."""
    # Not np.load, which takes a zip for an archive of arrays. A header is at most 10,000
    # characters, read as a literal; bad ones raise anything, such as tokenize.TokenError.
    try:
        column: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"no column: {error}") from None
    # Training looks at samples in random order. Where the system reads ahead (megabytes, on
    # some machines), the first micro-batch of a large index takes seconds instead of
    # milliseconds.
    column._mmap.madvise(advice)  # type: ignore[attr-defined]
    return np.asarray(column)  # np.memmap is slow to index


def _open_column(
    root: Path, manifest: dict[str, Any], name: str, advice: int = mmap.MADV_RANDOM
) -> npt.NDArray[Any]:
    path = root / "index" / f"{name}.npy"
    try:
        column = map_column(path, advice)
        if column.dtype != columns_of(manifest)[name] or column.shape != shape_of(name, manifest):
            raise ValueError(f"it holds {column.dtype} {column.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); {_REMAKE} {root}`") from None
    return column


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(manifest: dict[str, Any]) -> str:
    """16 hex digits over the manifest: what the samples are, not how well they were found."""
    text = json.dumps(
        {k: v for k, v in manifest.items() if k not in ("hash", "problems", "passed_over")},
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
