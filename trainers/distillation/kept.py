"""A teacher's outputs on the disk, by view: what it said of each (step, micro-batch).

FOLDER/KEY/view.json says what the key stands for; FOLDER/KEY/outputs holds a record for each
micro-batch of each step, at a place of its own, so that any rank of any run writes and reads
there without a word to the others.
"""

import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bigbatch.configs.files import to_json, write_atomically
from bigbatch.data.order import Positions

OutputType = Literal["float32", "float16"]
_OUTPUTS = "outputs"
_DIGEST = 16  # bytes


class KeptOutputs:
    """Records of outputs [rows, width] in one file, read and written in place.

    A record is a digest and the outputs. The digest is over the record's place, its samples and
    its outputs: what a killed process left half written, what nobody has written yet, and what
    was said of other samples (one could not be read then, or can not now) is no record.
    """

    def __init__(
        self,
        path: Path,
        *,
        steps: int,
        first: Callable[[int], int],
        rows: int,
        width: int,
        kind: OutputType,
    ) -> None:
        """Open what `reserve` has made for this many steps. Raises OSError.

        `first` is the number of micro-batches in so many steps of the run.
        """
        self._steps, self._first = steps, first
        self._shape, self._kind = (rows, width), np.dtype(kind)
        self._size = record_size(rows, width, kind)
        self._file = os.open(path / _OUTPUTS, os.O_RDWR)
        self._close = weakref.finalize(self, os.close, self._file)

    def read(self, step: int, index: int, samples: Positions) -> npt.NDArray[Any] | None:
        """The outputs of a micro-batch of these samples; None where there are none. OSError."""
        if step >= self._steps:
            return None
        record = os.pread(self._file, self._size, self._place(step, index))
        digest, content = record[:_DIGEST], record[_DIGEST:]
        if len(record) < self._size or digest != _digest(step, index, samples, content):
            return None
        return np.frombuffer(content, self._kind).reshape(self._shape)

    def write(self, step: int, index: int, samples: Positions, outputs: npt.NDArray[Any]) -> None:
        """Keep the outputs of a micro-batch, unless its step is beyond those kept. OSError."""
        assert outputs.shape == self._shape
        assert outputs.dtype == self._kind
        if step >= self._steps:
            return
        content = outputs.tobytes()
        record = _digest(step, index, samples, content) + content
        os.pwrite(self._file, record, self._place(step, index))

    def _place(self, step: int, index: int) -> int:
        return (self._first(step) + index) * self._size


def record_size(rows: int, width: int, kind: OutputType) -> int:
    """Bytes of a micro-batch's record."""
    return _DIGEST + rows * width * np.dtype(kind).itemsize


def reserve(folder: Path, view: dict[str, Any], *, steps: int, step_bytes: int, limit: int) -> int:
    """Make room for a view's outputs in `folder`; for how many of `steps` there is some.

    All views together never have more than `limit` bytes, whoever reserves at the same time.
    Files are sparse: what is reserved takes room on the disk once it is written. Nothing is
    removed or cut. Raises OSError.
    """
    own = folder / key_of(view)
    own.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # released when it is closed
        if not (own / "view.json").exists():
            write_atomically(own / "view.json", to_json(view, indent=1) + "\n")
        sizes = {path: path.stat().st_size for path in folder.glob(f"*/{_OUTPUTS}")}
        there = sizes.pop(own / _OUTPUTS, 0)
        room = max(0, limit - sum(sizes.values())) // step_bytes
        wanted = max(there, min(steps, room) * step_bytes)
        with (own / _OUTPUTS).open("ab") as file:
            if wanted > there:
                file.truncate(wanted)
    return min(steps, wanted // step_bytes)


def key_of(view: dict[str, Any]) -> str:
    """The name of a view's folder: 32 hex digits over all that decides the outputs."""
    return hashlib.sha256(json.dumps(view, sort_keys=True).encode()).hexdigest()[:32]


def _digest(step: int, index: int, samples: Positions, content: bytes) -> bytes:
    head = f"{step} {index} ".encode() + np.ascontiguousarray(samples, "<i8").tobytes()
    return hashlib.blake2b(head + content, digest_size=_DIGEST).digest()
