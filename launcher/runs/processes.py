"""The processes of runs on this machine: found by their module and the run that they name."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.planning.swap import worker_runs

# An agent comes first: it answers a signal even while its ranks do not listen yet.
_MODULES = ("bigbatch.trainers.agent", "bigbatch.trainers.worker")
_PROC = Path("/proc")


class Trainer(NamedTuple):
    """A process that trains; `path` is the run as its command line has it."""

    module: str
    pid: int
    path: Path


def processes(run: RunDir, trainers: Sequence[Trainer] | None = None) -> list[int]:
    """The agents, then the ranks, that work on a run here, also before they note a start.

    A process counts where its command line names this very directory: its number alone may
    belong to another program by now, and a copy of a run has the records of the original.
    `trainers`: those of this machine, for who asks about many runs.
    """
    here = find_trainers() if trainers is None else trainers
    return [trainer.pid for trainer in here if _is_same(trainer, run)]


def busy_workers(run: RunDir) -> list[RunDir]:
    """Of a run with phases, the workers that train here now; while they do, it has no process."""
    try:
        workers = worker_runs(run, run.recipe())
    except UserError:  # no recipe that can be read says that there are any
        return []
    here = find_trainers() if workers else []
    return [worker for worker in workers if processes(worker, here)]


def find_trainers() -> list[Trainer]:
    """All processes of this machine that train a run."""
    found: list[Trainer] = []
    for entry in _PROC.iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = os.fsdecode((entry / "cmdline").read_bytes()).rstrip("\0").split("\0")
        except OSError:  # it has ended meanwhile
            continue
        # The first -m: other launchers pass the worker's on to it.
        module = words[words.index("-m") + 1] if "-m" in words[:-2] else ""
        if module in _MODULES:
            found.append(Trainer(module, int(entry.name), Path(words[-1])))
    return sorted(found)


def _is_same(trainer: Trainer, run: RunDir) -> bool:
    process = _PROC / str(trainer.pid)
    try:
        try:
            return (process / "cwd" / trainer.path).samefile(run.path)
        except PermissionError:  # another user's: by the name alone, of that user's runs
            owned = process.stat().st_uid == run.path.stat().st_uid
            return owned and trainer.path.name == run.path.absolute().name
    except OSError:
        return False
