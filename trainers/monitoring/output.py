"""What a rank says goes where it always went, and into RUN/logs/rank-NNNNN.log as well.

A small process stands between: it reads what the rank and its children write to standard
output and error, also below Python (NCCL, the C library, a crash dump), passes it on byte
for byte, and appends it to the log line by line with the time (UTC), so that
`bigbatch logs` can merge the ranks. It outlives a rank that is killed, and loses nothing.
"""

import atexit
import fcntl
import os
import pty
import re
import selectors
import signal
import socket
import struct
import sys
import termios
import tty
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from bigbatch.configs.files import see_that_it_ends

_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_MOST = 65_536  # bytes at once; a line that is longer is cut into several


_process = 0  # the one that copies; descriptors 1 and 2 are this process's only ones
_stop = -1  # a byte written here asks it to end


def copy_output(run: Path) -> None:
    """Copy what this rank and its children say into the run's log, until they end."""
    global _process, _stop
    # torchrun's variables; before the engine is up nothing else says which rank this is.
    rank, world = int(os.environ.get("RANK", "0")), os.environ.get("WORLD_SIZE", "1")
    path = run / "logs" / f"rank-{rank:05d}.log"
    if not (run / "recipe.yaml").is_file():
        return  # no run directory; the worker says so
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        see_that_it_ends(path)  # a pipe would wait for its reader
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        print(f"bigbatch: no log of this rank: {error}", file=sys.stderr, flush=True)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    stop, _stop = os.pipe()
    pairs = [_channel(number) for number in (1, 2)]
    # A signal to the whole group must not end the copying before it knows to ignore it.
    everything = signal.valid_signals()
    former = signal.pthread_sigmask(signal.SIG_BLOCK, everything)
    _process = os.fork()
    if _process == 0:
        try:
            for each in everything - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
                signal.signal(each, signal.SIG_IGN)
            for writer in (_stop, *(writer for _, writer in pairs)):
                os.close(writer)
            readers = {reader: number for number, (reader, _) in enumerate(pairs, 1)}
            title = f"rank {rank} of {world}, pid {os.getppid()}, {socket.gethostname()}"
            _copy(readers, stop, log, title)
        finally:
            os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, former)
    for number, (reader, writer) in enumerate(pairs, 1):
        os.dup2(writer, number)
        os.close(reader)
        os.close(writer)
    os.close(stop)
    os.close(log)
    atexit.register(close_output)  # after a traceback has been printed


def reader_has_gone() -> int:
    """The status of a process whose output nobody reads any more, as before `| head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to flush goes nowhere
    return 1


def close_output() -> None:
    """Wait until everything that was said has been passed on. Nothing may be said after it."""
    global _process
    sys.stdout.flush()
    sys.stderr.flush()
    if _process:
        pid, _process = _process, 0
        with suppress(OSError):  # it was killed; so was what it had not passed on
            os.write(_stop, b".")
            os.waitpid(pid, 0)


def leave(status: int) -> NoReturn:
    """End this process at once: for entries that have closed what they opened.

    Python's own way out takes one to two seconds where torch is loaded, and once in about fifteen
    starts on CPU it ends in "terminate called without an active exception" from a thread of
    gloo's. Functions of `atexit` do not run.
    """
    with suppress(BrokenPipeError):  # whoever read the output has gone, as `head` does
        close_output()
    os._exit(status)


def _channel(number: int) -> tuple[int, int]:
    """(reader, writer) in place of a descriptor; a terminal stays one for whoever asks."""
    if not os.isatty(number):
        return os.pipe()
    reader, writer = pty.openpty()
    tty.setraw(writer)
    size = struct.pack("HHHH", 0, 0, 0, 0)
    fcntl.ioctl(writer, termios.TIOCSWINSZ, fcntl.ioctl(number, termios.TIOCGWINSZ, size))
    return reader, writer


def _copy(readers: dict[int, int], stop: int, log: int, title: str) -> None:
    """Until all writers are gone, or a byte on `stop`: what is there then is still copied."""
    pending = dict.fromkeys(readers, b"")
    _write(log, _stamp() + f"--- {title}\n".encode())
    # Not epoll, which knows of what a pseudo-terminal was given only once the kernel has come round
    # to it: after a byte on `stop`, last words were lost where the machine was busy.
    with selectors.PollSelector() as selector:
        for reader in (*readers, stop):
            os.set_blocking(reader, False)
            selector.register(reader, selectors.EVENT_READ)
        left, stopping = set(readers), False
        while left:
            ready = {key.fd for key, _ in selector.select(0 if stopping else None)}
            if stopping and not ready & left:
                break
            if stop in ready:
                stopping = True
                selector.unregister(stop)
            for reader in ready & left:
                try:
                    data = os.read(reader, _MOST)
                except OSError:  # a pseudo-terminal without writers
                    data = b""
                if not data:
                    selector.unregister(reader)
                    left.discard(reader)
                _write(readers[reader], data)
                *lines, rest = (pending[reader] + data).split(b"\n")
                if len(rest) > _MOST:
                    # A progress line is drawn again and again without an end.
                    rest = rest.rpartition(b"\r")[2][-_MOST:]
                pending[reader] = rest
                _write(log, b"".join(_stamp() + _plain(line) + b"\n" for line in lines))
    for rest in pending.values():
        if _plain(rest):
            _write(log, _stamp() + _plain(rest) + b"\n")


def _plain(line: bytes) -> bytes:
    """What stays on a terminal's line: no colours, and only the last of what was drawn over."""
    return _ESCAPES.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2]


def _stamp() -> bytes:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ ").encode()


def _write(number: int, data: bytes) -> None:
    """All of it, or as much as can be: a full disk or a closed terminal ends nothing."""
    while data:
        try:
            data = data[os.write(number, data) :]
        except OSError:
            return
