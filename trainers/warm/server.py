"""The process that ranks are forked from: imports their modules, forks, and does nothing else.

python -P -m bigbatch.trainers.warm.server DESCRIPTOR PID [MODULE]...
"""

import contextlib
import gc
import importlib
import io
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from bigbatch.trainers.warm.command_line import show
from bigbatch.trainers.warm.parent import SERVER, Request, die_with, receive, send

# What may differ between the variables that libraries were loaded with and those of a fork: torch,
# gloo, NCCL and wandb read these when they are used, and pytest's is read by nobody. With any
# other one, known or not, a fork might not be what a fresh process is.
_READ_WHEN_USED = frozenset(
    (
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"),
        *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID"),
        *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE"),
        *("TORCHELASTIC_SIGNALS_TO_HANDLE", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
        *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "CUDA_VISIBLE_DEVICES"),
        *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "WANDB_MODE", "PYTEST_CURRENT_TEST"),
    )
)
_GPUS = ("/dev/nvidia", "/dev/kfd", "/dev/dri")
# pyarrow's second allocator starts a thread when it is loaded.
_NO_THREAD = ("JE_ARROW_MALLOC_CONF", "background_thread:false")


def serve(
    connection: socket.socket, asker: int, modules: Sequence[str], env: Mapping[str, str]
) -> NoReturn:
    """Fork what `asker` asks for over `connection`, until that is closed.

    `env`: the variables that this process began with. Only forks leave the loop, to run.
    """
    die_with(asker)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # A fork answers signals as it is told to, and not before.
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    before = dict(os.environ)
    problem = _title(env) or _load(modules)
    # What modules have set as they were imported is set in a fresh process that imports them too.
    imported = {name: v for name, v in os.environ.items() if before.get(name) != v}
    while True:
        try:
            message, descriptors = receive(connection)
        except (OSError, EOFError):
            os._exit(0)
        request = Request(**message)
        cold = problem or _unlike(request, env) or unsafe()
        if cold is not None:
            send(connection, {"cold": cold})
        elif (pid := _fork(connection)) == 0:
            _become(request, imported, *descriptors)
        else:
            send(connection, {"pid": pid})
        for descriptor in descriptors:
            os.close(descriptor)


def _title(env: Mapping[str, str]) -> str | None:
    """Be no run's process to who looks for those; why forks cannot be such, where they cannot."""
    try:
        show([sys.executable, "-P", "-m", SERVER], env)
    except OSError as error:
        return f"the kernel lets no process say what it runs (prctl: {error.strerror})"
    return None


def _load(modules: Sequence[str]) -> str | None:
    """Import what forks will need; what is wrong where that fails: a fresh process says it too."""
    os.environ.setdefault(*_NO_THREAD)
    gc.disable()  # imports leave nothing to collect, and a fifth of their time goes into looking
    try:
        for name in modules:
            importlib.import_module(name)
    except Exception as error:
        return f"{name} cannot be imported ({type(error).__name__}: {error})"
    finally:
        del os.environ[_NO_THREAD[0]]
    # OpenBLAS has started its threads, and ends them itself before a fork.
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    # A collection in a fork would write to the pages of every object, and so copy them.
    gc.freeze()
    return None


def unsafe() -> str | None:
    """Why this process must not be forked now; None where it may be.

    A lock that another thread holds would stay locked in the fork, and CUDA cannot be used in one
    where it has been started before.
    """
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        names = sorted(_read(f"/proc/self/task/{thread}/comm").strip() for thread in threads)
        return f"{len(threads)} threads run in the process to fork from: {', '.join(names)}"
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            opened = os.readlink(f"/proc/self/fd/{descriptor}")
            if opened.startswith(_GPUS):
                return f"{opened} is open in the process to fork from"
    return None


def _unlike(request: Request, env: Mapping[str, str]) -> str | None:
    """Why a fork would not be what a fresh process is; None where it would."""
    if request.command[0] != sys.executable or not _target(request.command):
        return f"{request.command[0]} is another program"
    for name in sorted({*env, *request.env} - _READ_WHEN_USED):
        if env.get(name) != request.env.get(name):
            return f"{name} differs from what libraries were loaded with"
    if not os.path.isdir(request.cwd):
        return f"{request.cwd} is no folder"
    path = request.env.get("PYTHONPATH", "")
    if path and request.cwd != os.getcwd() and not all(map(os.path.isabs, path.split(os.pathsep))):
        return f"PYTHONPATH={path} means other folders from {request.cwd}"
    return None


def _target(command: Sequence[str]) -> tuple[str, bool, list[str]] | None:
    """What a command runs: a module (True) or a script, and its arguments."""
    match command[1:]:
        case ["-P", "-m", name, *arguments]:
            return name, True, arguments
        case ["-P", name, *arguments] if name.endswith(".py"):
            return name, False, arguments
    return None


def _fork(connection: socket.socket) -> int:
    """0 in a fork whose parent has ended, so that the kernel finds it another; else its number."""
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        pid = os.fork()
        if pid == 0:
            connection.close()
            os.close(reader)
            os.close(writer)
            return 0
        os.write(writer, str(pid).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(middle, 0)
    with open(reader) as pipe:
        return int(pipe.read())


def _become(
    request: Request, imported: Mapping[str, str], ready: int, *descriptors: int
) -> NoReturn:
    """Be what a fresh process of this command would be, and run it."""
    go = socket.socket(fileno=ready)
    if go.recv(1) == b"":
        os._exit(1)  # who asked is gone
    if request.new_session:
        os.setsid()
    os.chdir(request.cwd)
    os.umask(request.umask)
    os.sched_setaffinity(0, request.cpus)
    gc.enable()  # as in a fresh process
    env = {**request.env, **imported}
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    os.environ.update(env)
    show(request.command, request.env)
    _new_randomness()
    _take_signals(request)
    # Closes `go` as well, for which `popen` waits.
    go.detach()
    _take_streams(dict(zip(request.numbers, descriptors, strict=True)))
    found = _target(request.command)
    assert found is not None
    name, is_module, arguments = found
    sys.orig_argv[:] = request.command
    sys.argv[:] = [name, *arguments]
    if is_module:
        # What runs as __main__ is not known by its name; a package is, and its __main__ runs.
        for known in (name, f"{name}.__main__"):
            if not hasattr(sys.modules.get(known), "__path__"):
                sys.modules.pop(known, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")
    sys.exit()


def _take_streams(wanted: Mapping[int, int]) -> None:
    """Put these descriptors in the places of the standard ones; all others are closed."""
    for number in (0, 1, 2):  # those of a message are above 2: these are open in this process
        if number in wanted:
            os.dup2(wanted[number], number)
        else:
            os.close(number)
    os.closerange(3, 1 + max(int(name) for name in os.listdir("/proc/self/fd")))
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.write_through:
        sys.stdout.reconfigure(line_buffering=os.isatty(1))


def _take_signals(request: Request) -> None:
    """Dispositions and mask as Python leaves them at its start, where its parent ignores some."""
    ignored = {*request.ignored, signal.SIGPIPE, signal.SIGXFSZ}
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)


def _new_randomness() -> None:
    """What Python and NumPy draw from the system once per process. (`random`, `tempfile` and
    `uuid` see to it themselves, and torch's generators begin with a constant.)"""
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    process: Any = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


if __name__ == "__main__":
    _, descriptor, asker, *names = sys.argv
    with socket.socket(fileno=int(descriptor)) as connection:
        serve(connection, int(asker), names, dict(os.environ))
