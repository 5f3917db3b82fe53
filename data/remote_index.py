"""Indexing tars on remote storage: each is read once through the cache."""

import os
import posixpath
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.data.classes import parse_classes
from bigbatch.data.energon import SPLIT_FILE
from bigbatch.data.index import OURS, Index, is_shard, write_index
from bigbatch.data.pool import map_all
from bigbatch.data.remote import open_remote
from bigbatch.data.retry import retry
from bigbatch.data.samples import Scan, scan_shard
from bigbatch.data.splits import one_split_only
from bigbatch.data.staging import Cache, Remote, file_system, read


def build_remote_index(remote: Remote, *, workers: int = 1, skip_bad: bool = False) -> Index:
    """Index the archives ``*.tar`` at a URL, and write the index beside them.

    As build_index does, with classes.txt beside the archives or in the folder above. Where
    the store can be read only (https), index the tars where they can be written.
    """
    system, path = file_system(remote.url)
    if "http" in system.protocol:
        raise UserError(
            f"{remote.url} can be read only, and its files cannot be listed; run `bigbatch index` "
            "where the tars lie, and serve SPLIT/index/ beside them"
        )
    names, beside = _tars(remote, system, path)
    one_split_only(names, remote.url)
    _refuse_parts(remote, system, path)
    Cache(Path(remote.cache), remote.limit)  # fails here rather than in every process
    scan = partial(_scan, remote)
    scans = [scan(n) for n in names] if workers == 1 else map_all(scan, names, workers)
    with tempfile.TemporaryDirectory() as folder:
        classes = _classes(remote, system, path)
        write_index(Path(folder), names, scans, classes, skip_bad, remote.url, beside)
        _upload(remote, system, path, Path(folder) / "index")
    return open_remote(remote)


def _refuse_parts(remote: Remote, system: Any, path: str) -> None:
    """UserError where megatron-energon has divided the archives: an index is one split."""
    path = path.rstrip("/")
    for folder in (path, posixpath.dirname(path)):
        if retry(remote.url, partial(system.exists, f"{folder}/{SPLIT_FILE}")):
            raise UserError(
                f"{remote.url} has a split of its own ({SPLIT_FILE}), which `bigbatch index` keeps "
                "only in a local folder; index it there, or remove that file"
            )


def _tars(remote: Remote, system: Any, path: str) -> tuple[list[str], dict[str, int]]:
    """The archives in a remote folder, sorted by name; and what else lies there, counted."""

    def ask() -> list[dict[str, Any]]:
        system.invalidate_cache()
        found: list[dict[str, Any]] = system.ls(path, detail=True)
        return found

    names = [posixpath.basename(i["name"]) for i in retry(remote.url, ask) if i["type"] == "file"]
    tars = sorted(filter(is_shard, names))
    if not tars:
        raise UserError(f"{remote.url} holds no *.tar shards; give the folder that holds them")
    others = [n for n in names if n not in tars and n not in OURS]
    return tars, dict(Counter(f"files {Path(n).suffix or 'without extension'}" for n in others))


def _scan(remote: Remote, name: str) -> Scan:
    handle = Cache(Path(remote.cache), remote.limit).open(remote.shard(name))
    try:
        with tempfile.TemporaryDirectory() as folder:
            # Under its own name, which problems are told by, and held against eviction.
            path = Path(folder) / name
            path.symlink_to(f"/proc/{os.getpid()}/fd/{handle}")
            return scan_shard(path)
    finally:
        os.close(handle)


def _classes(remote: Remote, system: Any, path: str) -> tuple[str, ...] | None:
    for folder, url in (
        (path, remote.url),
        (posixpath.dirname(path.rstrip("/")), posixpath.dirname(remote.url)),
    ):
        name = f"{folder}/classes.txt"
        if retry(url, partial(system.exists, name)):
            return parse_classes(read(f"{url}/classes.txt"), f"{url}/classes.txt")
    return None


def _upload(remote: Remote, system: Any, path: str, folder: Path) -> None:
    """The manifest comes last: beside the old one, new columns are damage that is noticed."""
    files = sorted(folder.iterdir(), key=lambda file: file.name == "manifest.json")
    target = f"{path.rstrip('/')}/index"
    retry(remote.url, partial(system.makedirs, target, exist_ok=True))
    for file in files:
        retry(f"{remote.url}/index/{file.name}", partial(_put, system, file, target))


def _put(system: Any, file: Path, target: str) -> None:
    system.put_file(str(file), f"{target}/{file.name}")
