"""One trial as a run: a child of this process, a job, or one that outlived a killed search."""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Protocol

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.launcher.child import Children
from bigbatch.launcher.runs import registry
from bigbatch.launcher.slurm import squeue
from bigbatch.launcher.slurm.submit import SCRIPT, job_of, note_job

_ASK_S = 5.0  # seconds between questions to SLURM


class Handle(Protocol):
    """A run that somebody else executes."""

    def running(self) -> bool: ...

    def stop(self) -> None:
        """Ask it, by a signal, to save and end."""


class Here:
    """A child process."""

    def __init__(self, run: RunDir, children: Children) -> None:
        self._child = children.start(run)

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
            self._running = not registry.has_ended(self._run)
        return self._running

    def stop(self) -> None:
        with contextlib.suppress(UserError):  # it has ended meanwhile
            registry.cancel(self._run)


def is_submitted(run: RunDir) -> bool:
    """Whether a trial has become a job, also where the search was killed before that was noted.

    What a submission that never reached SLURM has left is removed. Raises UserError where
    SLURM cannot be asked.
    """
    if not run.path.exists():
        return False
    if job_of(run) is not None or run.metrics.exists():
        return True
    job = squeue.job_of_script(str(run.path / SCRIPT))
    if job is not None:
        note_job(run, job)
        return True
    shutil.rmtree(run.path)
    return False


def submit(
    recipe: str, overrides: Sequence[str], run: RunDir, options: Sequence[str], *flags: str
) -> None:
    """Submit a trial by `bigbatch submit`, to which `flags` go as well.

    Raises UserError with what `bigbatch submit` says.
    """
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "submit", *options, "--json"]
    command += ["--run-dir", str(run.path), *flags, "--", recipe, *overrides]
    # A session of its own: Ctrl-C must not come between sbatch and the note of the job.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, start_new_session=True
    )
    if done.returncode != 0:
        error = done.stderr.strip().removeprefix("bigbatch: ")
        raise UserError(f"submitting {run.path.name}: {error}")
