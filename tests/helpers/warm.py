"""Processes of tests, forked from one that has imported torch: most of a start is imports.

For what does not test how a process comes to be. `trainers/warm/parent.py` says why a fork is the
same, and tests/trainers/warm holds it to that; what cannot be one starts from nothing.
"""

import atexit
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bigbatch.trainers.warm.parent import OF_A_RANK, OF_AN_END, Parent, Process, start_parent

_ROOT = str(Path(__file__).parents[2])
# What the programs of tests import; a script is often a test itself.
_MODULES = (
    *(*OF_A_RANK, *OF_AN_END, "bigbatch.trainers.agent", "bigbatch.trainers.inference.__main__"),
    *("pytest", "hypothesis"),
)


@cache
def _parent() -> Parent:
    parent = start_parent(_MODULES, _environment(None))
    atexit.register(parent.close)
    return parent


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    """With this folder's modules in the path."""
    known = dict(os.environ if env is None else env)
    path = known.get("PYTHONPATH", "").split(os.pathsep)
    if _ROOT not in path:
        known["PYTHONPATH"] = os.pathsep.join([_ROOT, *filter(None, path)])
    return known


def popen(command: Sequence[object], **options: Any) -> Process:
    """`subprocess.Popen` of a Python module or script, with `Parent.popen`'s options."""
    env = _environment(options.pop("env", None))
    return _parent().popen([str(word) for word in command], env=env, **options)


def run(
    command: Sequence[object],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of such a command; what is captured is text."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        if capture_output:
            options |= {"stdout": output, "stderr": errors}
        process = popen(command, **options)
        try:
            status = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        said = []
        for file in (output, errors):
            file.seek(0)
            said.append(file.read().decode())
    done = subprocess.CompletedProcess(list(command), status, *said)
    if check:
        done.check_returncode()
    return done


class Shared:
    """In place of a process to fork from that this one would start for itself: the tests' own.

    Whoever has asked for it may close it; it goes on.
    """

    def __init__(self, modules: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        pass

    @property
    def pid(self) -> int:
        return _parent().pid

    def popen(self, command: Sequence[object], **options: Any) -> Process:
        return popen(command, **options)

    def close(self) -> None:
        pass


def bigbatch(*arguments: object) -> list[str]:
    """The command line's command, for `run` and `popen`; what it starts is forked as well."""
    return script(Path(__file__).with_name("forked_cli.py"), *arguments)


def script(path: Path, *arguments: object) -> list[str]:
    """The command of a script; without its folder in the path, as everywhere here."""
    return [sys.executable, "-P", str(path), *map(str, arguments)]
