"""Copies of remote files on a node's disk, shared by its processes.

    CACHE/files/KEY/{NAME, .about.json}     complete copies
    CACHE/partial/KEY/                     being downloaded, or left behind by a killed process
    CACHE/locks/                           one lock for each download, one for room

KEY is a hash of the URL and of the file's version (ETag, or size and time), so a file that
changes is another file. A folder moves from partial to files by one rename, after its bytes
are on the disk: whatever is killed at whatever moment, files/ holds whole copies only. Locks
are flock's, which the kernel releases with the process that held them.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from google_crc32c import value as crc32c

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import sync, to_json, write_atomically
from bigbatch.configs.json_text import parse_json
from bigbatch.data.retry import retry

PIECE = 8 << 20  # bytes in one request
ABOUT = ".about.json"
_CONNECTIONS = 4  # for one file
_PATIENCE_S = 120.0  # with a cache that is full of files in use
_POLL_S = 0.2
# What may tell one version of a file from another, in the words of fsspec's file systems.
_VERSION = (
    ("ETag", "etag", "md5Hash", "md5", "Content-MD5", "content_hash"),
    ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created"),
)


class Remote(NamedTuple):
    """A folder on remote storage, and the cache through which to read it."""

    url: str
    cache: str
    limit: int  # bytes

    def shard(self, name: str) -> str:
        return f"{self.url}/{name}"


def is_url(path: str) -> bool:
    return "://" in path


def default_cache() -> Path:
    """$XDG_CACHE_HOME/bigbatch, or ~/.cache/bigbatch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigbatch"


class _File(NamedTuple):
    """A remote file as it is now."""

    url: str
    system: Any  # fsspec's file system
    path: str  # in it
    size: int | None  # bytes, where the server says it
    version: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.url}\n{self.version}".encode()).hexdigest()[:32]

    @property
    def name(self) -> str:
        name = self.path.rstrip("/").rpartition("/")[2].partition("?")[0]
        return "file" if name[:1] in ("", ".") else name  # `..` leads elsewhere


class _NoRanges(Exception):
    """The server sends whole files only."""


class Cache:
    """At most `limit` bytes of remote files in `folder`, least recently used ones leave first."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = Path(folder).expanduser().absolute(), limit
        self._seen: dict[str, _File] = {}
        try:
            for name in ("files", "partial", "locks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to the cache {self.folder} ({error.strerror}); set data.cache to a "
                "folder on a local disk"
            ) from None

    def open(self, url: str) -> int:
        """A descriptor of a whole local copy, which stays as long as it is open.

        Downloads it first where there is none; of several processes, one does. The version
        of each file is asked for once. Raises UserError where the file does not exist or
        may not be read, where the store fails for good, and where there is no room.
        """
        file = self._seen.get(url)
        if file is None:
            file = self._seen[url] = stat(url)
        while True:
            handle = self._open_copy(file)
            if handle is not None:
                return handle
            with self.only_one(file.key):
                if not self._copy(file).exists():
                    file = self._seen[url] = self._download(file)

    def drop_damaged(self, url: str) -> bool:
        """Remove the copy of `url` where it is not what was downloaded; whether that was so."""
        file = self._seen.get(url)
        if file is None:
            return False
        handle = self._open_copy(file)
        if handle is None:
            return True
        try:
            about = parse_json((self._copy(file).parent / ABOUT).read_bytes())
            damaged = _checksums(handle) != about["crc32c"]
        except (OSError, ValueError, KeyError, TypeError):
            damaged = True
        finally:
            os.close(handle)
        if damaged:
            with self.only_one(file.key):
                self._discard(self._copy(file).parent)
        return damaged

    def _copy(self, file: _File) -> Path:
        return self.folder / "files" / file.key / file.name

    def _open_copy(self, file: _File) -> int | None:
        """A locked descriptor of a copy that is there; None where there is none."""
        try:
            handle = os.open(self._copy(file), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        found = os.fstat(handle)
        if found.st_nlink == 0:  # removed between opening and locking
            os.close(handle)
            return None
        if file.size is not None and found.st_size != file.size:
            os.close(handle)
            with self.only_one(file.key):
                self._discard(self._copy(file).parent)
            return None
        with suppress(OSError):
            os.utime(handle)  # the time of last use
        return handle

    def _download(self, file: _File) -> _File:
        """Put a copy into files/; under the lock of its key. Returns what was copied."""
        target = self._reserve(file)
        folder = target.parent
        try:
            with target.open("r+b") as copy:
                checksums = fetch(file, copy.fileno())
                os.fsync(copy.fileno())
                if _checksums(copy.fileno()) != checksums:
                    raise UserError(f"{target} reads back other bytes; check its disk")
            if file.size is None:  # only now it is known how much room it takes
                with self.only_one("room"):
                    self._make_room(0)
            now = stat(file.url)
            if now.version != file.version:
                # Replaced meanwhile: what we have may be half of each.
                shutil.rmtree(folder)
                return now
            about = {"url": file.url, "version": file.version, "crc32c": checksums}
            write_atomically(folder / ABOUT, to_json(about))
            sync(folder)
            folder.rename(self.folder / "files" / file.key)
            sync(self.folder / "files")
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise UserError(
                    f"the disk of {self.folder} is full; lower data.cache_gb, or set data.cache "
                    "to a folder on a larger one"
                ) from None
            raise
        return file

    def _reserve(self, file: _File) -> Path:
        """An empty file of the right size in partial/, for which there is room."""
        size = file.size or 0
        folder = self.folder / "partial" / file.key
        shutil.rmtree(folder, ignore_errors=True)  # of a killed process
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            with self.only_one("room"):
                if self._make_room(size):
                    folder.mkdir()
                    target = folder / file.name
                    with target.open("wb") as empty:
                        empty.truncate(size)
                    return target
            if size > self.limit or time.monotonic() > deadline:
                raise UserError(
                    f"no room for {file.url} ({size:,} bytes) in the cache {self.folder}: it may "
                    f"hold {self.limit:,} bytes, and what it holds is in use; raise data.cache_gb"
                )
            time.sleep(_POLL_S)

    def _make_room(self, size: int) -> bool:
        """Remove unused copies, the least recently used first, until `size` bytes more fit."""
        for left in (self.folder / "partial").iterdir():
            # A download holds its lock; what lies here without one was left by a kill.
            with self.only_one(left.name, wait=False) as mine:
                if mine:
                    shutil.rmtree(left, ignore_errors=True)
        coming = sum(_held(folder)[1] for folder in (self.folder / "partial").iterdir())
        copies = [(*_held(folder), folder) for folder in (self.folder / "files").iterdir()]
        excess = coming + sum(held for _, held, _ in copies) + size - self.limit
        for _, held, folder in sorted(copies):
            if excess <= 0:
                break
            if self._evict(folder):
                excess -= held
        return excess <= 0

    def _evict(self, folder: Path) -> bool:
        """Remove a copy unless someone has it open."""
        try:
            handle = os.open(_content(folder) or folder / ABOUT, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return not folder.exists()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._discard(folder)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        return True

    def _discard(self, folder: Path) -> None:
        """Remove a copy. Out of files/ by one rename: no half of it is ever found there."""
        gone = self.folder / "partial" / f"{folder.name}.gone-{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def only_one(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock `name`; whether it is held, which only `wait=False` leaves open."""
        path = self.folder / "locks" / name
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(handle)
                yield False
                return
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    break
            os.close(handle)  # its last holder has removed it
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)


def _content(folder: Path) -> Path | None:
    """The copy in a folder of files/ or partial/."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            if path.name != ABOUT:
                return path
    return None


def _held(folder: Path) -> tuple[float, int]:
    """When the copy in a folder was last used, and its bytes."""
    with suppress(FileNotFoundError):
        if content := _content(folder):
            found = content.stat()
            return found.st_mtime, found.st_size
    return 0, 0


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises UserError."""
    import fsspec  # here: a tenth of a second that local data need not wait for

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = "bigbatch[s3]" if url.startswith(("s3:", "s3a:")) else "what it names"
        raise UserError(f"cannot read {url}: {error}; pip install {extra}") from None
    except ValueError as error:
        raise UserError(f"cannot read {url}: {error}") from None
    if hasattr(system, "retries"):
        system.retries = 1  # s3fs; repeated here and there, attempts would multiply
    return system, path


def stat(url: str) -> _File:
    """The file at a URL as it is now. Raises UserError."""
    system, path = file_system(url)

    def ask() -> dict[str, Any]:
        system.invalidate_cache()  # a listing may be older than the file
        found: dict[str, Any] = system.info(path)
        return found

    info = retry(url, ask)
    if info["type"] != "file":
        raise UserError(f"{url} is a folder; give the URL of a file")
    tags = [next((str(info[n]) for n in names if info.get(n)), "") for names in _VERSION]
    return _File(url, system, path, info.get("size"), " ".join([*tags, str(info.get("size"))]))


def read(url: str) -> bytes:
    """A small file, whole and as it is now. Raises UserError."""
    system, path = file_system(url)
    data: bytes = retry(url, lambda: system.cat_file(path))
    return data


def fetch(file: _File, handle: int) -> list[int]:
    """Write a remote file into an open one; the CRC-32C of each piece of 8 MiB."""
    if file.size is None:
        return _fetch_whole(file, handle)
    starts = range(0, file.size, PIECE)
    threads = ThreadPoolExecutor(_CONNECTIONS)
    try:
        return list(threads.map(partial(_fetch_piece, file, handle), starts))
    except _NoRanges:
        pass
    finally:
        threads.shutdown(cancel_futures=True)  # after one failure the others are in vain
    return _fetch_whole(file, handle)


def _fetch_piece(file: _File, handle: int, start: int) -> int:
    assert file.size is not None
    end = min(start + PIECE, file.size)
    data = retry(file.url, lambda: _read_range(file, start, end))
    os.pwrite(handle, data, start)
    return crc32c(data)


def _read_range(file: _File, start: int, end: int) -> bytes:
    data: bytes
    if "http" in file.system.protocol:
        # cat_file would take the whole body from a server that knows no ranges.
        with file.system.open(
            file.path, "rb", block_size=PIECE, cache_type="none", size=file.size
        ) as remote:
            if remote.size is None:  # it says so itself
                raise _NoRanges
            try:
                remote.seek(start)
                data = remote.read(end - start)
            except ValueError as error:  # that the server knows no ranges
                raise _NoRanges from error
    else:
        data = file.system.cat_file(file.path, start=start, end=end)
    if len(data) != end - start:
        raise ConnectionError(f"{len(data):,} of {end - start:,} bytes arrived")
    return data


def _fetch_whole(file: _File, handle: int) -> list[int]:
    """In one stream, from the beginning after each failure."""
    path = f"/proc/self/fd/{handle}"

    def get() -> None:
        os.ftruncate(handle, 0)
        file.system.get_file(file.path, path)
        size = os.fstat(handle).st_size
        if file.size is not None and size != file.size:
            raise ConnectionError(f"{size:,} of {file.size:,} bytes arrived")

    retry(file.url, get)
    return _checksums(handle)


def _checksums(handle: int) -> list[int]:
    """The CRC-32C of each piece of an open file."""
    size = os.fstat(handle).st_size
    return [crc32c(os.pread(handle, PIECE, start)) for start in range(0, size, PIECE)]
