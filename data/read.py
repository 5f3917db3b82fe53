"""Reading samples out of shards: one pread each, checked against the index."""

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from google_crc32c import value as crc32c

from bigbatch.configs.errors import UserError

_OPEN_FILES = 256
_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.1
# Errors that waiting does not cure.
_FINAL = {errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR}


class BadSample(Exception):
    """Bytes that cannot be used: a wrong checksum, or no image. Never retried."""


class ShardReader:
    """Reads byte ranges of shards, from any number of threads."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int, crc: int) -> bytes:
        """Bytes [offset, offset + size) of paths[shard], whose CRC-32C must be `crc`.

        Raises BadSample where it is not, and UserError for a shard that cannot be read. I/O
        errors are retried with a doubling pause; the wrong bytes are wrong for good.
        """
        for attempt in range(_ATTEMPTS):
            try:
                file = self._file(shard)  # held while we read: it may be evicted
                data = os.pread(file.handle, size, offset)
                break
            except OSError as error:
                if error.errno in _FINAL or attempt == _ATTEMPTS - 1:
                    raise UserError(f"cannot read {self.paths[shard]}: {error.strerror}") from None
                with self._lock:
                    self._files.pop(shard, None)  # a stale network handle must be opened anew
                time.sleep(_FIRST_PAUSE_S * 2**attempt)
        if len(data) != size:
            raise BadSample(f"the shard ends after {len(data):,} of {size:,} bytes")
        if crc32c(data) != crc:
            raise BadSample("the bytes differ from the index (CRC-32C)")
        return data

    def _file(self, shard: int) -> "_File":
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _File(self.paths[shard])
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            return file


class _File:
    """A descriptor that is closed with its last user, who may still read when it is evicted."""

    def __init__(self, path: Path) -> None:
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
