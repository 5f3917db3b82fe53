"""One trial as a run: a child of this process, a job, or one that outlived a killed search."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Protocol

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.launcher import registry
from bigbatch.launcher.child import Child

_ASK_S = 5.0  # seconds between questions to SLURM


class Handle(Protocol):
    """A run that somebody else executes."""

    def running(self) -> bool: ...

    def stop(self) -> None:
        """Ask it, by a signal, to save and end."""


class Here:
    """A child process."""

    def __init__(self, run: RunDir, nproc: int) -> None:
        self._child = Child(run, nproc)

    def running(self) -> bool:
        return self._child.poll() is None

    def stop(self) -> None:
        self._child.stop()


class Elsewhere:
    """A job, also while it waits; or a run on this machine whose search was killed."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._asked = float("-inf")
        self._running = True

    def running(self) -> bool:
        now = time.monotonic()
        if self._running and now - self._asked >= _ASK_S:
            self._asked = now
            state = registry.look_up(self._run).state
            # "new": submitted, while SLURM cannot be asked.
            self._running = state in ("running", "queued", "new")
        return self._running

    def stop(self) -> None:
        with contextlib.suppress(UserError):  # it has ended meanwhile
            registry.cancel(self._run)


def submit(
    recipe: str, overrides: Sequence[str], run: RunDir, options: Sequence[str], dry: bool = False
) -> None:
    """Submit a trial by `bigbatch submit`; `dry`: only check that this would work.

    Raises UserError with what `bigbatch submit` says.
    """
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "submit", *options, "--json"]
    command += ["--run-dir", str(run.path), *(["--dry-run"] if dry else []), "--", recipe]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().removeprefix("bigbatch: ")
        raise UserError(f"submitting {run.path.name}: {said}")
