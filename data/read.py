"""Reading samples out of shards: one pread each, checked against the index."""

import errno
import os
import threading
import time
from collections import OrderedDict

from google_crc32c import value as crc32c

from bigbatch.configs.errors import UserError
from bigbatch.data.index import Index

_OPEN_FILES = 256
_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.1
# Errors that waiting does not cure.
_FINAL = {errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR}


class BadSample(Exception):
    """Bytes that cannot be used: a wrong checksum, or no image. Never retried."""


class ShardReader:
    """Reads samples of an index by any thread of one process.

    Files are opened when first needed and by each process for itself: a forked child must
    not close its parent's descriptors.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def read(self, sample: int) -> bytes:
        """The encoded image of `sample`. Raises BadSample, and UserError for a lost shard.

        I/O errors are retried with a doubling pause; the wrong bytes are wrong for good.
        """
        shard, size = int(self.index.shard[sample]), int(self.index.size[sample])
        offset = int(self.index.offset[sample])
        for attempt in range(_ATTEMPTS):
            try:
                data = os.pread(self._file(shard), size, offset)
                break
            except OSError as error:
                if error.errno in _FINAL or attempt == _ATTEMPTS - 1:
                    path = self.index.root / self.index.shards[shard].name
                    raise UserError(f"cannot read {path}: {error}") from None
                self._forget(shard)
                time.sleep(_FIRST_PAUSE_S * 2**attempt)
        if len(data) != size or crc32c(data) != int(self.index.crc[sample]):
            raise BadSample("the bytes differ from the index (CRC-32C)")
        return data

    def _file(self, shard: int) -> int:
        with self._lock:
            if self._process != os.getpid():
                self._files, self._process = OrderedDict(), os.getpid()
            if shard not in self._files:
                if len(self._files) >= _OPEN_FILES:
                    os.close(self._files.popitem(last=False)[1])
                path = self.index.root / self.index.shards[shard].name
                self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._files.move_to_end(shard)
            return self._files[shard]

    def _forget(self, shard: int) -> None:
        """Open the file anew next time, as a stale network handle needs."""
        with self._lock:
            handle = self._files.pop(shard, None)
        if handle is not None:
            os.close(handle)
