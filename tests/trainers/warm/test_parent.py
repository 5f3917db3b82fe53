"""Forks are what a start from nothing gives, or none are made and the reason is told."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigbatch.trainers.warm import server
from bigbatch.trainers.warm.parent import SERVER, Parent, start_parent

# Everything of a process that whoever starts it decides, as JSON.
ABOUT = """
import json, os, signal, sys
fields = dict(l.split(":", 1) for l in open("/proc/self/status").read().splitlines())
found = {
    "command": open("/proc/self/cmdline").read(),
    "environ": sorted(open("/proc/self/environ").read().split("\\0")),
    "env": dict(sorted(os.environ.items())),
    "cwd": os.getcwd(),
    "parent": os.getppid(),
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "flags": str(sys.flags),
    "name": __name__, "file": __file__, "main": sys.modules["__main__"].__name__,
    "signals": [fields[name].strip() for name in ("SigBlk", "SigIgn", "SigCgt")],
    "handlers": [str(signal.getsignal(n)).split(" at ")[0] for n in (2, 13, 15)],
    "umask": fields["Umask"].strip(), "cpus": fields["Cpus_allowed_list"].strip(),
    "descriptors": [n for n in range(64) if os.path.exists(f"/proc/self/fd/{n}")],
    "targets": [os.readlink(f"/proc/self/fd/{n}") for n in (0, 1, 2)],
    "leads": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()],
    "streams": [[s.encoding, s.errors, s.line_buffering] for s in (sys.stdout, sys.stderr)],
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which ABOUT is the module `about`."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "about.py").write_text(ABOUT)
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(folder), *(os.path.abspath(name) for name in path if name)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture(scope="module")
def said() -> list[str]:
    """Why commands were started from nothing."""
    return []


@pytest.fixture(scope="module")
def parent(env: dict[str, str], said: list[str]) -> Iterator[Parent]:
    with start_parent(("numpy",), env, said.append) as parent:
        yield parent


def script(folder: Path, code: str, *arguments: str) -> list[str]:
    path = folder / "script.py"
    path.write_text(code)
    return [sys.executable, "-P", str(path), *arguments]


def written(start: Any, command: list[str], folder: Path, **options: Any) -> Any:
    """What a command writes to its standard output, as JSON."""
    with (folder / "out.json").open("w") as file:
        process = start(command, stdout=file, **options)
    assert process.wait(30) == 0
    return json.loads((folder / "out.json").read_text())


def both(parent: Parent, command: list[str], folder: Path, **options: Any) -> list[Any]:
    """Started from nothing, and forked."""
    starts = (subprocess.Popen, parent.popen)
    return [written(start, command, folder, **options) for start in starts]


def test_a_fork_is_what_a_start_from_nothing_is(
    parent: Parent, env: dict[str, str], said: list[str], tmp_path: Path
) -> None:
    command = script(tmp_path, ABOUT, "a b", "", "--c")
    cold, warm = both(parent, command, tmp_path, env={**env, "RANK": "3"})
    assert warm == cold
    assert warm["parent"] == os.getpid()
    assert not said


def test_also_with_all_that_a_launcher_decides(
    parent: Parent, env: dict[str, str], said: list[str], tmp_path: Path
) -> None:
    """Signals held back and ignored, a folder, a session, other streams, one core."""
    options = {"cwd": tmp_path, "start_new_session": True, "stderr": subprocess.STDOUT}
    options |= {"stdin": subprocess.DEVNULL, "env": env}
    command = [sys.executable, "-P", "-m", "about", "one"]
    ignored, mask, cpus = signal.getsignal(signal.SIGHUP), os.umask(0o027), os.sched_getaffinity(0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
    os.sched_setaffinity(0, {min(cpus)})
    try:
        cold, warm = both(parent, command, tmp_path, **options)
    finally:
        os.sched_setaffinity(0, cpus)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR2})
        signal.signal(signal.SIGHUP, ignored)
        os.umask(mask)
    assert warm == cold
    assert not said


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('no shards')", 1, "no shards\n"),
        ("import os; os._exit(75)", 75, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit, sys; atexit.register(print, 'last', file=sys.stderr)", 0, "last\n"),
    ],
)
def test_how_it_ends(
    parent: Parent, env: dict[str, str], tmp_path: Path, code: str, status: int, says: str
) -> None:
    with (tmp_path / "said").open("w") as file:
        process = parent.popen(script(tmp_path, code), env=env, stderr=file)
    assert process.wait() == status
    assert process.poll() == process.returncode == status
    said = (tmp_path / "said").read_text()
    assert said.endswith(says)
    assert bool(said) == bool(says)
    process.kill()  # of what has ended, as subprocess does it: nothing


def test_waiting_has_an_end(parent: Parent, env: dict[str, str], tmp_path: Path) -> None:
    process = parent.popen(script(tmp_path, "import time; time.sleep(60)"), env=env)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL


def test_no_two_forks_draw_the_same(parent: Parent, env: dict[str, str], tmp_path: Path) -> None:
    code = """
import json, multiprocessing, random, tempfile, uuid
import numpy
key = bytes(multiprocessing.current_process().authkey).hex()
drawn = [random.random(), numpy.random.rand(), str(uuid.uuid4()), tempfile.mktemp(), key]
print(json.dumps(drawn))
"""
    command = script(tmp_path, code)
    drawn = [written(parent.popen, command, tmp_path, env=env) for _ in range(2)]
    assert all(a != b for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"OMP_NUM_THREADS": "7"}, "OMP_NUM_THREADS differs from what libraries were loaded with"),
        ({"NOBODY_KNOWS": "1"}, "NOBODY_KNOWS differs"),
    ],
)
def test_a_variable_that_may_have_been_read_starts_from_nothing(
    parent: Parent,
    env: dict[str, str],
    said: list[str],
    tmp_path: Path,
    change: dict[str, str],
    reason: str,
) -> None:
    command = script(tmp_path, ABOUT)
    cold, warm = both(parent, command, tmp_path, env={**env, **change})
    assert warm == cold
    assert said.pop().startswith(reason)
    assert not said


def test_other_programs_and_folders_that_are_not_there(
    parent: Parent, env: dict[str, str], said: list[str], tmp_path: Path
) -> None:
    assert parent.popen(["/bin/true"], env=env).wait(30) == 0
    with pytest.raises(FileNotFoundError):
        parent.popen(script(tmp_path, ""), env=env, cwd=tmp_path / "none")
    assert said == ["/bin/true is another program", f"{tmp_path / 'none'} is no folder"]
    said.clear()


def test_a_path_that_means_another_folder_elsewhere(env: dict[str, str], tmp_path: Path) -> None:
    env = {**env, "PYTHONPATH": f"typings{os.pathsep}{env['PYTHONPATH']}"}
    said: list[str] = []
    with start_parent((), env, said.append) as parent:
        cold, warm = both(parent, script(tmp_path, ABOUT), tmp_path, env=env)
        assert not said
        assert warm == cold
        cold, warm = both(parent, script(tmp_path, ABOUT), tmp_path, env=env, cwd=tmp_path)
    assert said[0].startswith("PYTHONPATH=typings:")
    assert warm == cold


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
            "2 threads run in the process to fork from",
        ),
        ("import nothing", "begins cannot be imported (ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_forked_from_is_not(
    env: dict[str, str], tmp_path: Path, code: str, reason: str
) -> None:
    (tmp_path / "begins.py").write_text(code)
    env = {**env, "PYTHONPATH": f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"}
    said: list[str] = []
    with start_parent(("begins",), env, said.append) as parent:
        cold, warm = both(parent, script(tmp_path, ABOUT), tmp_path, env=env)
    assert warm == cold
    (told,) = said
    assert told.startswith(reason)


def test_what_an_import_sets_is_set(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "begins.py").write_text("import os; os.environ['SET'] = 'by an import'")
    env = {**env, "PYTHONPATH": f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"}
    with start_parent(("begins",), env, pytest.fail) as parent:
        cold, warm = both(parent, script(tmp_path, f"import begins\n{ABOUT}"), tmp_path, env=env)
    assert warm == cold
    assert warm["env"]["SET"] == "by an import"


def test_a_gpu_that_is_open_is_not_carried_into_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.os, "listdir", lambda path: ["1"])  # one thread
    monkeypatch.setattr(server.os, "readlink", lambda path: "/dev/null")
    assert server.unsafe() is None
    monkeypatch.setattr(server.os, "readlink", lambda path: "/dev/nvidiactl")
    assert server.unsafe() == "/dev/nvidiactl is open in the process to fork from"


SLEEPER = "import time; print('here', flush=True); time.sleep(60)"


def test_what_was_forked_outlives_the_parent(env: dict[str, str], tmp_path: Path) -> None:
    said: list[str] = []
    with start_parent(("json",), env, said.append) as parent:
        sleeper = parent.popen(script(tmp_path, SLEEPER), env=env, stdout=subprocess.DEVNULL)
        pid = parent.pid
        os.kill(pid, signal.SIGKILL)
        assert parent.popen([sys.executable, "-P", "-m", "about"], env=env).wait(30) == 0
        assert said == ["the process to fork from has ended"]
        assert not psutil.pid_exists(pid)
    assert sleeper.poll() is None
    sleeper.kill()
    assert sleeper.wait(30) == -signal.SIGKILL


def test_the_parent_ends_with_who_asked(env: dict[str, str], tmp_path: Path) -> None:
    """Killed by SIGKILL, while it imports as well."""
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    env = {**env, "PYTHONPATH": f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"}
    code = f"""
import os, subprocess
from bigbatch.trainers.warm.parent import start_parent
a, b = start_parent(("json",)), start_parent(("slow",))
nowhere = subprocess.DEVNULL
c = a.popen({script(tmp_path, SLEEPER)!r}, stdout=nowhere, stderr=nowhere)
print(a.pid, b.pid, c.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    (tmp_path / "asks.py").write_text(code)
    command = [sys.executable, str(tmp_path / "asks.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    *parents, fork = map(int, done.stdout.split())
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in parents):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert alive(fork)  # as what subprocess starts: a search goes on with such runs
    os.kill(fork, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_parent_is_no_run_to_who_looks_for_those(parent: Parent) -> None:
    assert psutil.Process(parent.pid).cmdline() == [sys.executable, "-P", "-m", SERVER]
