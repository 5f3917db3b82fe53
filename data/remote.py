"""Splits on remote storage: their index is copied first, shards when they are needed."""

import hashlib
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import sync
from bigbatch.data.index import Index, open_index
from bigbatch.data.index_check import columns_of, shape_of
from bigbatch.data.index_files import parse_manifest, verify_columns, verify_keys
from bigbatch.data.lanes import LaneOrder
from bigbatch.data.order import Order, Positions
from bigbatch.data.readahead import reading_ahead
from bigbatch.data.staging import Cache, Remote, default_cache, fetch, read, stat

_DOWNLOADS = 2  # shards at a time, of one rank
_NPY_HEADER = 1 << 12  # bytes, at most; NumPy writes 128

# To be called with the first position and the samples of each micro-batch before they are read.
Prefetch = Callable[[int, Positions], None]


def remote_at(url: str, cache: str | Path | None, cache_gb: float) -> Remote:
    """The folder at a URL, read through a cache of so many 1e9 bytes; see `default_cache`."""
    if not 0 < cache_gb < math.inf:
        raise UserError(f"a cache of {cache_gb:g} GB; give a size above 0, such as 100")
    folder = Path(cache or default_cache()).expanduser().absolute()
    return Remote(url.rstrip("/"), str(folder), int(cache_gb * 1e9))


def open_remote(remote: Remote) -> Index:
    """Open the index of a remote folder of shards, from a copy that is kept in the cache.

    Asks for the sizes of the first and the last shard; images are checked as they are
    read. Raises UserError where there is no index, it is damaged, or may not be read.
    """
    cache = Cache(Path(remote.cache), remote.limit)
    try:
        manifest = read(f"{remote.url}/index/manifest.json")
    except UserError as error:
        raise UserError(f"no index at {remote.url}: {error}") from None
    # An index is never edited, only replaced: its manifest is its version.
    name = hashlib.sha256(remote.url.encode() + b"\n" + manifest).hexdigest()[:32]
    root = cache.folder / "indexes" / name
    if not (root / "index").is_dir():
        with cache.only_one(name):
            if not (root / "index").is_dir():
                _copy_index(remote, manifest, root)
    index = open_index(root, remote)
    if odd := [shard.name for shard in index.shards if "::" in shard.name]:
        raise UserError(f"shard {odd[0]!a} of {remote.url}: `::` joins URLs; rename the shard")
    for shard in {index.shards[0], index.shards[-1]}:
        size = stat(remote.shard(shard.name)).size
        if size not in (None, shard.bytes):
            raise UserError(
                f"shard {remote.shard(shard.name)} has {size:,} bytes; it had {shard.bytes:,} when "
                f"it was indexed; restore it, or run `bigbatch index {remote.url}`"
            )
    return index


def _copy_index(remote: Remote, text: bytes, root: Path) -> None:
    """Copy the files that an index has, and no other one, whatever its manifest says."""
    temporary = root.with_name(f"{root.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
    try:
        manifest = parse_manifest(text)
        (temporary / "index").mkdir(parents=True)
        (temporary / "index" / "manifest.json").write_bytes(text)
        for name in (*(f"{column}.npy" for column in columns_of(manifest)), "keys.parquet"):
            found = stat(f"{remote.url}/index/{name}")
            _check_size(name, found.size, manifest)
            with (temporary / "index" / name).open("w+b") as file:
                fetch(found, file.fileno())
        verify_columns(temporary, manifest)
        verify_keys(temporary, manifest["samples"])
        for path in (*(temporary / "index").iterdir(), temporary / "index"):
            sync(path)
        temporary.rename(root)
    except ValueError as error:
        raise UserError(
            f"the index of {remote.url} is damaged, or was replaced while it was copied "
            f"({error}); start again, or make it again with `bigbatch index`"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(root.parent)


def _check_size(name: str, size: int | None, manifest: dict[str, Any]) -> None:
    """Raise ValueError for a column of another size than the manifest's samples take."""
    column = name.removesuffix(".npy")
    dtype = columns_of(manifest).get(column)
    if dtype is None or size is None:
        return
    values = math.prod(shape_of(column, manifest))
    expected = values * np.dtype(dtype).itemsize
    if not expected <= size <= expected + _NPY_HEADER:
        raise ValueError(f"{name} has {size:,} bytes, its {values:,} values take {expected:,}")


@contextmanager
def prefetching(index: Index, order: Order, numbers: range) -> Iterator[Prefetch]:
    """Have the next shards of a rank copied by another process while the body runs.

    `numbers` are the rank's micro-batches in a step: range(rank, ..., world). Of a local index,
    the samples are brought into memory. Raises UserError where the cache cannot hold what the
    order mixes.
    """
    if index.remote is None:
        with reading_ahead(index) as want:
            yield lambda position, samples: want(samples)
        return
    _check_room(index, order, index.remote, numbers)
    with _Fetcher(index, index.remote) as fetcher:
        if isinstance(order, LaneOrder):
            lanes = order
            yield lambda position, samples: fetcher.want(
                lanes.lane(position), lanes.upcoming(position)
            )
        else:
            # Ranks start at different shards, and so share the work within a node.
            count = len(index.shards)
            start = numbers.start * count // numbers.step
            fetcher.want(0, [*range(start, count), *range(start)])
            yield lambda position, samples: None


@contextmanager
def prefetching_in_order(index: Index) -> Iterator[Prefetch]:
    """The same for samples in index order, whose positions they are."""
    if index.remote is None:  # the system's own read-ahead is made for this
        yield lambda position, samples: None
        return
    with _Fetcher(index, index.remote) as fetcher:

        def prefetch(position: int, samples: Positions) -> None:
            shard = int(index.shard[position])
            fetcher.want(0, list(range(shard, min(shard + 3, len(index.shards)))))

        yield prefetch


def _check_room(index: Index, order: Order, remote: Remote, numbers: range) -> None:
    if isinstance(order, LaneOrder):
        lanes = len({number % order.lanes for number in numbers})
        need = 2 * order.window * lanes * max(shard.bytes for shard in index.shards)
        what = f"two windows of {order.window} shards in {lanes} lanes"
        remedy = "or lower data.window, or use more ranks"
    else:
        need = sum(shard.bytes for shard in index.shards)
        what = "all shards, which a full random order needs"
        remedy = "or read few shards at a time by data.lanes"
    if need > remote.limit:
        raise UserError(
            f"the cache {remote.cache} may hold {remote.limit:,} bytes, less than {what} "
            f"({need:,}); raise data.cache_gb, {remedy}"
        )


class _Fetcher:
    """A process that copies shards into the cache, in the order in which they are wanted."""

    def __init__(self, index: Index, remote: Remote) -> None:
        self._names = [remote.shard(shard.name) for shard in index.shards]
        self._wanted: dict[int, list[int]] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bigbatch.data.remote", remote.cache, str(remote.limit)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is for the trainer, which ends us
        )

    def __enter__(self) -> "_Fetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def want(self, group: int, shards: list[int]) -> None:
        """`shards` are what a group needs now and next; what is new among them is copied."""
        before = self._wanted.get(group, [])
        if shards == before:
            return
        self._wanted[group] = shards
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # without it, shards come when they are read
            for shard in shards:
                if shard not in before:
                    stdin.write(self._names[shard] + "\n")
            stdin.flush()


def main() -> None:
    """Copy the URLs that come in, until their sender is gone."""
    cache = Cache(Path(sys.argv[1]), int(sys.argv[2]))
    urls: SimpleQueue[str] = SimpleQueue()

    def work() -> None:
        while True:
            # A failure meets the reader of that shard, too, who says it.
            with suppress(UserError, OSError):
                os.close(cache.open(urls.get()))

    for _ in range(_DOWNLOADS):
        threading.Thread(target=work, daemon=True).start()
    for line in sys.stdin:
        urls.put(line.rstrip("\n"))
    os._exit(0)  # at once: what is half copied is nobody's loss


if __name__ == "__main__":
    main()
