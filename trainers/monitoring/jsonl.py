"""Files that are appended to while a disk may fill up or a process be killed."""

import os
import threading
from pathlib import Path
from typing import Any

from bigbatch.configs.files import append_whole, to_json


class Appending:
    """Appends bytes to a file, in order, and holds them back while the disk takes none."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._waiting = b""
        self._lock = threading.Lock()  # `sync` may come from another thread

    def append_bytes(self, content: bytes) -> str | None:
        """Append them whole. Returns why they are held back, or None: they are in the file."""
        with self._lock:
            self._waiting += content
        return self._flush()

    def sync(self) -> None:
        """Put all of it onto the disk; raises OSError where it takes none."""
        refusal = self._flush()
        if refusal:
            raise OSError(refusal)
        os.fsync(self._handle)

    def close(self) -> None:
        self._flush()
        os.close(self._handle)

    def _flush(self) -> str | None:
        # One write a line and no fsync, which would cost a disk round trip a step.
        with self._lock:
            if not self._waiting:
                return None
            try:
                append_whole(self._handle, self._waiting)
            except OSError as error:
                return str(error)
            self._waiting = b""
            return None


class JsonLines(Appending):
    """A file of whole lines of JSON."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        size = os.fstat(self._handle).st_size
        torn = size > 0 and os.pread(self._handle, 1, size - 1) != b"\n"
        # A last line torn by a kill is ended first, so that it stands alone.
        self._waiting = b"\n" if torn else b""

    def append(self, record: dict[str, Any]) -> str | None:
        """Append one record. Returns why it is held back, or None: it is in the file."""
        return self.append_bytes(to_json(record).encode() + b"\n")
