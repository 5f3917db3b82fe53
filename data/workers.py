"""Decoding processes: byte ranges go in, pixels come back through shared memory. No torch.

A worker is a fresh Python process that imports NumPy and the decoders only. It starts in a
few tenths of a second and takes few megabytes, where a spawned or forked copy of the trainer
would import torch again, or inherit its threads and its CUDA context. It keeps no state but
small images: it is ended by closing its socket, and one that is killed takes nothing with it
but its batch.

Each batch travels in a `Slab`, a stretch of anonymous shared memory (memfd, so no limit of
/dev/shm applies). Slabs are used again: fresh pages cost the system as much time as a small
JPEG's decoding. A slab is free again when the last view of its pixels is gone.
"""

import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.configs.size import Size
from bigbatch.data.decode_batch import BYTE_RANGE, BatchDecoder, ByteRanges, Decoded, Key, Source
from bigbatch.data.geometry import FRAME, Frames, View
from bigbatch.data.maps import Map
from bigbatch.data.staging import Remote

_TASK = struct.Struct("<IIqq")  # slab, samples, step, micro-batch
_REPLY = struct.Struct("<QQ")  # bytes of pixels, bytes of JSON behind them
# A terminal and a batch system signal every process; what to do about it is the trainer's.
_NOT_OURS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
# For glibc, which would give the bytes of each batch back to the system, and then pay for
# fresh pages again: up to a twentieth of the decoding.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
_FIRST_SIZE = 1 << 20  # of a slab, in bytes


class Slab:
    """Shared memory of one batch: byte_ranges [B], frames [B], pixels, and a JSON text."""

    def __init__(self, handle: int, size: int = 0) -> None:
        self.handle = handle
        if size:
            os.ftruncate(handle, size)
        self._memory = mmap.mmap(handle, 0)

    def __del__(self) -> None:
        os.close(self.handle)

    def view(self, start: int, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of memory [start, ...), which grows as needed; other views stay valid."""
        end = start + count * np.dtype(dtype).itemsize
        if end > len(self._memory):
            if end > os.fstat(self.handle).st_size:
                os.ftruncate(self.handle, end + end // 4)
            self._memory = mmap.mmap(self.handle, 0)
        return np.frombuffer(self._memory, dtype, count, start)

    def byte_ranges(self, samples: int) -> ByteRanges:
        return self.view(0, samples, BYTE_RANGE)

    def frames(self, samples: int) -> Frames:
        return self.view(_aligned(samples * BYTE_RANGE.itemsize), samples, FRAME)

    def pixels(self, samples: int, count: int) -> npt.NDArray[np.uint8]:
        return self.view(_pixels_at(samples), count, np.uint8)

    def text(self, samples: int, pixels: int, count: int) -> npt.NDArray[np.uint8]:
        return self.view(_pixels_at(samples) + pixels, count, np.uint8)


def _pixels_at(samples: int) -> int:
    return _aligned(samples * BYTE_RANGE.itemsize) + _aligned(samples * FRAME.itemsize)


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


class WorkerPool:
    """Decoding processes. Batches come back in the order in which they were submitted."""

    def __init__(self, source: Source, workers: int) -> None:
        settings = {**vars(source), "root": str(source.root), "shards": list(source.shards)}
        settings["view"] = source.view and _plain(source.view)
        handle = os.memfd_create("bigbatch-settings")
        try:
            with open(handle, "wb", closefd=False) as file:
                file.write(json.dumps(settings).encode())
            self._workers = [_Worker(handle) for _ in range(workers)]
        finally:
            os.close(handle)
        self._slabs: list[Slab] = []
        self._free: deque[int] = deque()  # numbers of slabs
        self._busy: deque[tuple[_Worker, int, int]] = deque()  # worker, slab, samples

    def submit(self, byte_ranges: ByteRanges, key: Key = (0, 0)) -> None:
        """Give a micro-batch to the worker that has least to do. Does not wait.

        Taking turns instead, all workers would be as slow as the one on the busiest core.
        """
        worker = min(self._workers, key=_Worker.left_to_do)
        try:
            number = self._free.pop()  # the one used last: its pages are the likeliest in a cache
        except IndexError:
            number = len(self._slabs)
            self._slabs.append(Slab(os.memfd_create("bigbatch-slab"), _FIRST_SIZE))
        self._slabs[number].byte_ranges(len(byte_ranges))[:] = byte_ranges
        worker.submit(number, self._slabs[number], len(byte_ranges), key)
        self._busy.append((worker, number, len(byte_ranges)))

    def receive(self) -> Decoded:
        """The batch that was submitted first. Raises UserError where its worker cannot."""
        worker, number, samples = self._busy.popleft()
        size, length = worker.receive()
        slab = self._slabs[number]
        reply = json.loads(slab.text(samples, size, length).tobytes())
        if "error" in reply:
            raise UserError(reply["error"])
        pixels = slab.pixels(samples, size)
        # All views of these pixels, NumPy's and torch's, keep this one buffer alive.
        weakref.finalize(pixels.base, self._free.append, number).atexit = False
        bad = {int(i): reason for i, reason in reply["bad"].items()}
        shard, seconds = reply["slow_read"]
        return Decoded(pixels, slab.frames(samples).copy(), bad, (shard, seconds))

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class _Worker:
    """The trainer's end of one decoding process."""

    def __init__(self, settings: int) -> None:
        self._slabs: set[int] = set()  # that it has
        self._waiting = 0  # tasks whose reply was not asked for yet
        self._replies: deque[bytes] = deque()  # to the first of these
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The child inherits the mask, from its first instruction on.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_OURS)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "bigbatch.data.workers", str(theirs.fileno())],
                stdin=settings,
                env={**_KEEP_MEMORY, **os.environ},
                pass_fds=[theirs.fileno()],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()

    def submit(self, number: int, slab: Slab, samples: int, key: Key) -> None:
        handles = [] if number in self._slabs else [slab.handle]
        self._slabs.add(number)
        self._waiting += 1
        with suppress(ConnectionError):  # it is dead, and `receive` will say so
            socket.send_fds(self._socket, [_TASK.pack(number, samples, *key)], handles)

    def left_to_do(self) -> int:
        """How many batches it was given and has not decoded yet."""
        with suppress(BlockingIOError, ConnectionError):  # `receive` meets a dead worker
            while reply := self._socket.recv(_REPLY.size, socket.MSG_DONTWAIT):
                self._replies.append(reply)
        return self._waiting - len(self._replies)

    def receive(self) -> tuple[int, int]:
        """Of the first task: bytes of pixels, and of the JSON text behind them."""
        reply = self._replies.popleft() if self._replies else b""
        if not reply:
            with suppress(ConnectionError):
                reply = self._socket.recv(_REPLY.size)
        if not reply:
            raise UserError(self._epitaph())
        self._waiting -= 1
        size, length = _REPLY.unpack(reply)
        return size, length

    def close(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.wait()

    def _epitaph(self) -> str:
        status = self.process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else "failed"
        return (
            f"a decoding worker {how} (process {self.process.pid}, status {status}); where memory "
            "ran out, lower data.workers or micro_batch; then start the run again to resume it"
        )


def _plain(view: View) -> dict[str, Any]:
    """A view as JSON can hold it."""
    parts = {name: getattr(view, name) for name in ("crop", "affine")}
    return {**vars(view), **{name: part and part.model_dump() for name, part in parts.items()}}


def _view(plain: dict[str, Any]) -> View:
    # The recipe's own classes would need pydantic here; geometry only reads their fields.
    parts = {name: plain[name] and SimpleNamespace(**plain[name]) for name in ("crop", "affine")}
    maps = tuple(Map(name, place, p, tuple(values)) for name, place, p, values in plain["maps"])
    growth = tuple((step, _size(size)) for step, size in plain["growth"])
    changed = {**parts, "maps": maps, "growth": growth, "out": _size(plain["out"])}
    return View(**{**plain, **changed})


def _size(plain: Any) -> Size:
    return plain if isinstance(plain, int) else (plain[0], plain[1])


def main() -> None:
    """A worker's life: the settings from stdin, then one batch after another, until EOF."""
    settings = json.loads(os.pread(0, os.fstat(0).st_size, 0))
    settings["root"] = Path(settings["root"])
    settings["remote"] = settings["remote"] and Remote(*settings["remote"])
    settings["view"] = settings["view"] and _view(settings["view"])
    decoder = BatchDecoder(Source(**settings))
    slabs: dict[int, Slab] = {}
    with socket.socket(fileno=int(sys.argv[1])) as trainer:
        while True:
            try:
                message, handles, *_ = socket.recv_fds(trainer, _TASK.size, 1)
                if not message:
                    return
                number, samples, *key = _TASK.unpack(message)
                for handle in handles:  # one, where this worker meets the slab first
                    slabs[number] = Slab(handle)
                trainer.send(_make(decoder, slabs[number], samples, (key[0], key[1])))
            except ConnectionError:
                return


def _make(decoder: BatchDecoder, slab: Slab, samples: int, key: Key) -> bytes:
    """Decode one batch into its slab; the reply that says how much lies there."""
    try:
        done = decoder.decode(slab.byte_ranges(samples), lambda n: slab.pixels(samples, n), key)
    except UserError as error:
        size, text = 0, json.dumps({"error": str(error)})
    else:
        slab.frames(samples)[:] = done.frames
        size, text = len(done.pixels), json.dumps({"bad": done.bad, "slow_read": done.slow_read})
    data = text.encode()
    slab.text(samples, size, len(data))[:] = np.frombuffer(data, np.uint8)
    return _REPLY.pack(size, len(data))


if __name__ == "__main__":
    main()
