"""Reading samples out of shards: one pread each, checked against the index."""

import errno
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from google_crc32c import value as crc32c

from bigbatch.configs.errors import UserError
from bigbatch.data.staging import Cache

_OPEN_FILES = 256
_OPEN_COPIES = 4  # of remote shards: an open one cannot leave the cache
_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.1
# Errors that waiting does not cure.
_FINAL = {errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR}


class BadSample(Exception):
    """Bytes that cannot be used: a wrong checksum, or no image. Never retried."""


class ShardReader:
    """Reads byte ranges of shards, from any number of threads; URLs through `cache`.

    `loose` ones are image files, each by itself: no CRC is known, and one that cannot be read
    is a bad sample.
    """

    def __init__(
        self, paths: Sequence[Path | str], cache: Cache | None = None, *, loose: bool = False
    ) -> None:
        self.paths = paths
        self._loose = loose
        self._cache = cache
        self._most = _OPEN_FILES if cache is None else _OPEN_COPIES
        self._files: dict[int, _File] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int, crc: int) -> bytes:
        """Bytes [offset, offset + size) of paths[shard], whose CRC-32C must be `crc`.

        Raises BadSample where it is not, and UserError for a shard that cannot be read. I/O
        errors are retried with a doubling pause; the wrong bytes are wrong for good, unless
        only the cache's copy has them.
        """
        try:
            return self._read(shard, offset, size, crc)
        except BadSample:
            if self._cache is None or not self._cache.drop_damaged(str(self.paths[shard])):
                raise
        with self._lock:
            self._files.pop(shard, None)
        return self._read(shard, offset, size, crc)

    def _read(self, shard: int, offset: int, size: int, crc: int) -> bytes:
        for attempt in range(_ATTEMPTS):
            try:
                file = self._file(shard)  # held while we read: it may be evicted
                data = os.pread(file.handle, size, offset)
                break
            except OSError as error:
                if error.errno in _FINAL or attempt == _ATTEMPTS - 1:
                    if self._loose:
                        raise BadSample(f"cannot be read: {error.strerror}") from None
                    raise UserError(f"cannot read {self.paths[shard]}: {error.strerror}") from None
                with self._lock:
                    self._files.pop(shard, None)  # a stale network handle must be opened anew
                time.sleep(_FIRST_PAUSE_S * 2**attempt)
        if len(data) != size:
            raise BadSample(f"the shard ends after {len(data):,} of {size:,} bytes")
        if not self._loose and crc32c(data) != crc:
            raise BadSample("the bytes differ from the index (CRC-32C)")
        return data

    def in_memory(self, shard: int, offset: int) -> bool:
        """Whether this byte can be had without waiting for a disk; False where unknown."""
        try:
            return os.preadv(self._file(shard).handle, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return False
            raise

    def expect(self, shard: int, offset: int, size: int) -> None:
        """Have the system read these bytes into its cache; does not wait for them."""
        os.posix_fadvise(self._file(shard).handle, offset, size, os.POSIX_FADV_WILLNEED)

    def _file(self, shard: int) -> "_File":
        file = self._files.get(shard)
        if file is not None:
            return file
        # Not under the lock: a remote shard may take a while.
        file = _File(self.paths[shard], self._cache)
        with self._lock:  # several threads may have opened files meanwhile
            self._files[shard] = file
            while len(self._files) > self._most:
                del self._files[next(iter(self._files))]  # the one that is open longest
        return file


class _File:
    """A descriptor that is closed with its last user, who may still read when it is evicted."""

    def __init__(self, path: Path | str, cache: Cache | None) -> None:
        self.handle = -1
        if cache is None:
            self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            self.handle = cache.open(str(path))

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
