"""One process that has imported torch and a worker's modules, and from which ranks are forked.

    with start_parent(("bigbatch.trainers.worker",), env) as parent:
        rank = parent.popen([*python("bigbatch.trainers.worker"), "runs/digits"], env=env)

`popen` starts a command as `subprocess.Popen` would: with this process for its parent, and with
the command line, environment, folder, descriptors, signals and exit status of a start from
nothing. It takes milliseconds where Python's imports take seconds, and ranks share the memory of
what was imported. Where a fork would not be the same or not be safe, the command is started from
nothing, and `say` is told why.

A fork is handed over by the kernel: the parent forks a process that forks the rank and ends, and an
orphan goes to the nearest ancestor that asks for orphans (PR_SET_CHILD_SUBREAPER, prctl(2)), which
is this process. So waiting, signals and PR_SET_PDEATHSIG are those of any child, and the parent may
die at any time without harm to what runs. Free of torch.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Any, Protocol

from bigbatch.configs.files import to_json
from bigbatch.configs.notices import notice

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 1, 36, 37  # prctl(2)
SERVER = "bigbatch.trainers.warm.server"
WORKER = "bigbatch.trainers.worker"
# What a worker has imported before its first step, and at the end of a whole run.
OF_A_RANK = (
    WORKER,
    "bigbatch.trainers.run",
    "torch._dynamo",  # whose import every torch.optim.Optimizer brings (docs/log.md)
)
OF_AN_END = ("bigbatch.trainers.report.report",)


def say_cold(reason: str) -> None:
    """Say, once in a process, why no fork is made."""
    notice(f"processes start from nothing, which takes longer: {reason}")


class Process(Protocol):
    """What a start gives, forked or not: the part of subprocess.Popen that is used here."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class Request:
    """What a fork is told. Descriptors go beside it: the go-ahead, then those in `numbers`."""

    command: list[str]
    env: dict[str, str]
    cwd: str
    umask: int
    cpus: list[int]
    numbers: list[int]  # of standard input, output and error those that are open
    new_session: bool
    ignored: list[int]  # signals
    blocked: list[int]


class Forked:
    """A child of this process that it has not started itself."""

    def __init__(self, pid: int, args: Sequence[str]) -> None:
        self.pid = pid
        self.args = args
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal. Raises subprocess.TimeoutExpired."""
        if self.returncode is None and timeout is not None:
            ended = os.pidfd_open(self.pid)
            try:
                if not select.select([ended], [], [], max(0.0, timeout))[0]:
                    raise subprocess.TimeoutExpired(self.args, timeout)
            finally:
                os.close(ended)
        status = self._reap(0)
        assert status is not None
        return status

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid == self.pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Parent:
    """The process to fork from, seen from the one that asks. `pid` is its number."""

    def __init__(
        self, process: Process, connection: socket.socket, say: Callable[[str], None]
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._connection: socket.socket | None = connection
        self._say = say
        self._lock = threading.Lock()

    def popen(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        start_new_session: bool = False,
    ) -> Process:
        """Start a command. Streams are None (this process's own), files, or descriptors; of
        subprocess's names DEVNULL, and STDOUT for `stderr`."""
        environment = dict(os.environ if env is None else env)
        everything = signal.valid_signals()
        with contextlib.ExitStack() as stack:
            streams = _streams(stdin, stdout, stderr, stack)
            request = Request(
                command=list(command),
                env=environment,
                cwd=os.path.abspath(os.getcwd() if cwd is None else cwd),
                umask=_umask(),
                cpus=sorted(os.sched_getaffinity(0)),
                numbers=list(streams),
                new_session=start_new_session,
                ignored=[n for n in everything if signal.getsignal(n) is signal.SIG_IGN],
                blocked=[int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            )
            try:
                with self._lock:
                    pid = self._fork(request, list(streams.values()))
                return Forked(pid, request.command)
            except _Cold as error:
                self._say(str(error))
        return subprocess.Popen(
            request.command,
            env=environment,
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=start_new_session,
        )

    def _fork(self, request: Request, descriptors: list[int]) -> int:
        """The number of a new child of this process. Raises _Cold where there is none."""
        if self._connection is None:
            raise _Cold("the process to fork from has ended")
        go, theirs = socket.socketpair()
        try:
            with _takes_orphans():
                try:
                    with theirs:
                        send(self._connection, asdict(request), [theirs.fileno(), *descriptors])
                    answer, _ = receive(self._connection)
                except (OSError, EOFError):
                    self.close()
                    raise _Cold("the process to fork from has ended") from None
            if "pid" not in answer:
                raise _Cold(answer["cold"])
            go.sendall(b".")  # it is ours now; without this it ends
            go.recv(1)  # closed: it is what was asked for, also to signals and to `ps`
            return int(answer["pid"])
        except BaseException as error:
            if not isinstance(error, _Cold):  # such as a signal, before the answer was read
                self.close()
            raise
        finally:
            go.close()

    def close(self) -> None:
        """End the process to fork from; what was forked goes on."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._process.kill()
            self._process.wait()
            self.pid = -1  # the number may be another process's from now on

    def __enter__(self) -> "Parent":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Cold(Exception):
    """Why a command has to be started from nothing."""


def start_parent(
    modules: Sequence[str],
    env: Mapping[str, str] | None = None,
    say: Callable[[str], None] = say_cold,
) -> Parent:
    """Start the process to fork from, as a fresh interpreter that imports `modules`.

    `env` is what its forks will have but for what is a rank's own: libraries read variables as they
    are loaded. It imports while this process goes on.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-P", "-m", SERVER, str(theirs.fileno()), str(os.getpid())]
        process = subprocess.Popen([*command, *modules], env=env, pass_fds=[theirs.fileno()])
    return Parent(process, ours, say)


def fork_parent(
    modules: Sequence[str],
    env: Mapping[str, str],
    say: Callable[[str], None] = say_cold,
) -> Parent:
    """Fork it from this process, which shares what it has imported and goes on without the rest.

    `env`: the environment with which this process began. It must not be called inside of anything
    that an end of this process would clean up, such as a `with`: forks run and end in its frame.
    """
    ours, theirs = socket.socketpair()
    own = os.getpid()
    pid = os.fork()
    if pid == 0:
        ours.close()
        from bigbatch.trainers.warm.server import serve

        serve(theirs, own, modules, env)
    theirs.close()
    return Parent(Forked(pid, [SERVER]), ours, say)


def send(connection: socket.socket, message: Any, descriptors: Sequence[int] = ()) -> None:
    data = to_json(message).encode()
    socket.send_fds(connection, [struct.pack("=Q", len(data))], descriptors)
    connection.sendall(data)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """A message and its descriptors. Raises EOFError where the other side is gone."""
    head, descriptors, _, _ = socket.recv_fds(connection, 8, 8)
    head += _exactly(connection, 8 - len(head)) if head else b""
    if not head:
        raise EOFError
    return json.loads(_exactly(connection, struct.unpack("=Q", head)[0])), descriptors


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


@contextmanager
def _takes_orphans() -> Iterator[None]:
    """Meanwhile the kernel hands orphaned descendants to this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    if libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before)) != 0:
        raise _Cold(f"prctl: {os.strerror(ctypes.get_errno())}")
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value)


def die_with(parent: int) -> None:
    """Let the kernel kill this process when `parent`, which started it, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _streams(
    stdin: int | IO[Any] | None,
    stdout: int | IO[Any] | None,
    stderr: int | IO[Any] | None,
    stack: contextlib.ExitStack,
) -> dict[int, int]:
    """The descriptor for each of 0, 1 and 2; one that is closed here stays closed there."""
    found: dict[int, int] = {}
    for number, stream in enumerate((stdin, stdout, stderr)):
        if stream == subprocess.DEVNULL:
            stream = os.open(os.devnull, os.O_RDWR)
            stack.callback(os.close, stream)
        elif stream == subprocess.STDOUT:
            stream = found[1]
        elif stream is None:
            stream = number
            try:
                os.fstat(number)
            except OSError:
                continue
        found[number] = stream if isinstance(stream, int) else stream.fileno()
    return found


def _umask() -> int:
    """Without setting another one, which all threads would see."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))
