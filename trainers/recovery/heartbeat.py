"""Each rank's sign of life in the run directory; rank 0's is also the lock on the run.

A file a rank, heartbeats/rank-NNNNN.json, rewritten in place every few seconds. What counts is
that it changes, never what time it says: clocks of machines differ, and jump. Free of torch.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json

_SIZE = 512  # bytes; one write of it is seen whole
_DYING_S = 5.0  # a killed process may take this long to let go of its files
_LEASE_S = 120.0  # and an NFS server to notice that a machine is gone


class Heartbeat:
    """One rank's file. `record` is what it says; `write` puts it there."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.path = heartbeat_path(folder, rank)
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        self.record: dict[str, Any] = {
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "task": _array_task(os.environ),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "beat": 0,
        }

    def lock(self, silence_s: float = 15.0) -> None:
        """Take the run for this process, until it ends; for rank 0, before it writes anything.

        Raises UserError, naming the holder, where another process has it. A dead process
        holds nothing: the kernel lets go of its lock, on NFS too. Where a file system's locks
        do not reach other machines, a heartbeat from one that goes on within `silence_s`
        seconds is a holder too, unless it is this very job's, which was requeued.
        """
        first = self._read()
        foreign = first.get("host", self.record["host"]) != self.record["host"]
        deadline = time.monotonic() + (_LEASE_S if foreign else _DYING_S)
        while True:
            try:
                # POSIX locks: no process that is started later inherits them.
                fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                holder = self._read()
                goes_on = foreign and holder.get("beat") != first.get("beat")
                if goes_on or time.monotonic() > deadline:
                    raise self._refusal(holder) from error
                time.sleep(0.1)
        holder = self._read()
        ours = (self.record["host"], holder.get("job") and self.record["job"])
        if holder and holder.get("host") != ours[0] and (not ours[1] or holder["job"] != ours[1]):
            deadline = time.monotonic() + silence_s
            while time.monotonic() < deadline:
                if self._read().get("beat") != holder.get("beat"):
                    raise self._refusal(self._read())
                time.sleep(0.5)
        self.write()

    def write(self, **changes: Any) -> None:
        """Beat. A full disk stops nothing: the file has its size from the start."""
        self.record.update(changes, beat=self.record["beat"] + 1)
        text = to_json(self.record).encode()[: _SIZE - 1].ljust(_SIZE - 1) + b"\n"
        with suppress(OSError):
            os.pwrite(self._handle, text, 0)

    def close(self) -> None:
        """Say that the run is free, and let it go."""
        if self.record["beat"]:  # otherwise the file is another process's
            with suppress(OSError):
                os.ftruncate(self._handle, 0)
        os.close(self._handle)

    def _read(self) -> dict[str, Any]:
        # By our own handle: closing any other one would give the lock up (fcntl(2)).
        return _parse(os.pread(self._handle, _SIZE, 0))

    def _refusal(self, holder: Mapping[str, Any]) -> UserError:
        name = holder.get("task") or holder.get("job")
        job = f", job {name}" if name else ""
        return UserError(
            f"{self.path.parent.parent} is in use by process {holder.get('pid')} on "
            f"{holder.get('host')}{job}, since {holder.get('since')}; wait for it, stop it, or "
            "start another run with --run"
        )


def _array_task(env: Mapping[str, str]) -> str | None:
    """What a person calls a task of SLURM's arrays, such as 4711_2.

    The job id of one of the tasks is the array's own number: scancel ends all of them by it.
    """
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else None


def heartbeat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def read_heartbeat(folder: Path, rank: int) -> dict[str, Any]:
    """Another rank's record; empty where there is none. Not for a rank's own: see `_read`."""
    try:
        return _parse(heartbeat_path(folder, rank).read_bytes())
    except OSError:
        return {}


def _parse(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
