"""Starting a run here: refuse what cannot work, make the run directory, become the worker."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import write_atomically
from bigbatch.configs.identity import NO_EFFECT, differences, summary
from bigbatch.configs.load import change_recipe, dump_recipe
from bigbatch.configs.notices import notice
from bigbatch.configs.rundir import RunDir, RunExists, check_name, create_run
from bigbatch.configs.schema import Recipe
from bigbatch.data.measured import as_in, with_measured
from bigbatch.launcher.env import (
    CHOSEN,
    Peers,
    default_nproc,
    forget_launch,
    free_port,
    start_variables,
)
from bigbatch.launcher.launchers import Launch, launch_command, worker_command
from bigbatch.trainers.monitoring.stage import stage
from bigbatch.trainers.planning.environment import check_environment
from bigbatch.trainers.planning.plan import check_world, fits, largest_world
from bigbatch.trainers.recovery.signals import SAVED, catch

RUNS = Path("runs")
# How long a rank waits for another one to make the run directory. Their starts are apart by
# what imports take on a busy file system.
_WAIT_S = 120.0
# What ends a process that is still on its way to be the worker, if nobody keeps it.
_HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def agent_command(
    run: Path,
    nproc: int,
    *,
    nnodes: int | str = 1,
    rdzv_endpoint: str | None = None,
    stop_at: int | None = None,
) -> list[str]:
    """The argument list that runs `nproc` ranks on this machine, of `nnodes` alike."""
    launch = Launch(nproc=nproc, nnodes=str(nnodes), endpoint=rdzv_endpoint)
    return launch_command(launch, run, stop_at)


def ranks_here(
    recipe: Recipe, peers: Peers | None, nproc: int | None, nnodes: int, env: Mapping[str, str]
) -> int | None:
    """How many ranks to start on this machine; None: this process is one, of `peers`.

    Without `nproc`: one rank per GPU, as many as the recipe can use. Raises UserError where
    more ranks would run than a step has micro-batches.
    """
    if peers is not None and nproc is None and nnodes == 1:
        check_world(recipe, peers.size)
        return None
    if peers is not None and peers.size > 1 and nnodes == 1:
        raise UserError(
            f"--nproc {nproc}, but {peers.launcher} has started {peers.size} processes already, "
            "and each would start a run of its own: drop --nproc to use those"
        )
    if nproc is None:
        most = min(default_nproc(env), max(1, largest_world(recipe) // nnodes))
        nproc = next((n for n in range(most, 0, -1) if fits(recipe, n * nnodes)), most)
    check_world(recipe, nproc * nnodes)
    return nproc


def hold_signals(peers: Peers | None) -> None:
    """Keep a launcher's signals for the worker: until it listens, it would die of them.

    A blocked signal waits, also across exec; the worker lets it through. And a rank that
    ends by itself keeps its own exit status when the launcher ends its peers. A start by a
    person ends at once, as one that has nothing to save: what it looks at may take long.
    """
    if peers is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        name = signal.Signals(number).name
        print(f"bigbatch: {name} before training began; nothing was lost", file=sys.stderr)
        sys.exit(SAVED)

    catch(stop, *_HELD)


@contextmanager
def one_voice(peers: Peers | None) -> Iterator[None]:
    """Let one rank of each machine say a UserError; what is missing differs by machine."""
    try:
        yield
    except UserError as error:
        if peers is None or peers.rank == 0:
            raise
        if peers.local_rank == 0:
            print(f"bigbatch: {socket.gethostname()}: {error}", file=sys.stderr)
        sys.exit(2)


def should_report(peers: Peers | None) -> bool:
    """Whether this process is the one of several alike that says what all of them know."""
    return peers is None or peers.rank == 0


def check_start(recipe: Recipe, peers: Peers | None = None) -> None:
    """Raise UserError, with the remedy, for what would stop a run of `recipe` at its start.

    Variables that would change what is computed, shards and indexes that are missing or
    damaged, and a schedule that does not fit. Of `peers` one says what is worth knowing, though
    nothing is refused.
    """
    check_environment(os.environ)
    from bigbatch.trainers.planning.inputs import open_inputs  # pyarrow takes a while to import

    notes = open_inputs(recipe).notes
    for note in notes if should_report(peers) else ():
        notice(note)


def run_path(
    recipe: Recipe, name: str | None, path: Path | None, peers: Peers | None, runs: Path = RUNS
) -> Path:
    """Where the run goes: `path`, or `runs`/`name`, or a name made from the recipe's.

    A name that is made up is a new one: NAME, NAME-2, ... Ranks that another launcher
    started cannot look for a free one without a race; theirs is NAME-JOB.
    """
    if path is not None:
        check_name(path.name)
        return path
    if name is not None:
        check_name(name)
        return runs / name
    if peers is not None:
        if peers.job is None:
            raise UserError(
                f"started by {peers.launcher}, which gives its processes no common id to name "
                "a new run by: add --run-name NAME, the same on every rank"
            )
        # torchrun --standalone makes up a UUID; its start is enough to tell runs apart.
        job = peers.job[:8] if _UUID.fullmatch(peers.job) else peers.job
        check_name(f"{recipe.name}-{job}")
        return runs / f"{recipe.name}-{job}"
    return unused_path(runs / recipe.name)


def unused_path(path: Path) -> Path:
    """`path`, or the first of PATH-2, PATH-3, ... where nothing is yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def join_run(path: Path, recipe: Recipe, wait_s: float = _WAIT_S) -> RunDir:
    """Create the run or go on with it: what each of several ranks does, in any order.

    Making a directory is atomic, so one rank creates the run and the others wait for its
    recipe. Launchers repeat the same command at a restart or a requeue, so a run that is
    there is gone on with. Raises UserError where it has another recipe.
    """
    try:
        return create_run(path, recipe, with_measured)
    except RunExists:
        if not path.is_dir():
            raise
    run = RunDir(path)
    if "measured" in (recipe.augment.mean, recipe.augment.std):
        wait_s *= 10  # another rank looks at many images
    deadline = time.monotonic() + wait_s
    while not run.recipe_file.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{path} exists but got no recipe.yaml within {wait_s:.0f} s; remove it, or "
                "choose another name with --run"
            )
        if not path.is_dir():  # whose maker met an error, which this rank shall say, too
            return join_run(path, recipe)
        time.sleep(0.1)
    if found := differences(run.recipe(), as_in(run.recipe(), recipe)):
        raise UserError(
            f"{path} was created with another recipe: {summary(found)}; go on with it by "
            f"`bigbatch resume {path}`, or choose another name with --run"
        )
    return run


def is_finished(run: RunDir, peers: Peers | None) -> bool:
    """Whether a run has nothing left to do, which is then said: it is not started again."""
    if not run.summary.exists():
        return False
    if peers is None or peers.rank == 0:
        print(f"{run.path} is finished; see {run.report}")
    return True


def changed_recipe(run: RunDir, overrides: tuple[str, ...], peers: Peers | None) -> Recipe:
    """A run's recipe with ``key=value`` changes that reach no weight; nothing is written.

    Raises UserError where a change would reach one, or nothing: a finished run trains no more.
    """
    before = run.recipe()
    changed = change_recipe(before, overrides, notice if should_report(peers) else None)
    if found := differences(before, changed):
        free = [
            key if part is None else f"{key}.{part}"
            for key, parts in NO_EFFECT.items()
            for part in ([None] if parts is True else sorted(parts))
        ]
        raise UserError(
            f"{' '.join(overrides)}: that changes what is computed ({summary(found)}), so this "
            f"would not be the same run; you may change {', '.join(free)}, go on in a new run by "
            f"`bigbatch fork {run.path} KEY=VALUE`, or start one"
        )
    if changed != before and run.summary.exists():
        raise UserError(
            f"{run.path} is finished, so {' '.join(overrides)} would have no effect; see "
            f"{run.report}, or train on in a new run by `bigbatch fork {run.path} KEY=VALUE`"
        )
    return changed


@contextmanager
def stored(run: RunDir, changed: Recipe, peers: Peers | None) -> Iterator[None]:
    """Store a run's changed recipe, and put the old one back where what follows is refused.

    One of several ranks writes it, and the others wait for it: each of them reads it again.
    """
    old = run.recipe_file.read_text(encoding="utf-8")
    if run.recipe() == changed:
        yield
        return
    if should_report(peers):
        try:
            write_atomically(run.recipe_file, dump_recipe(changed))
        except OSError as error:
            raise UserError(
                f"cannot write {run.recipe_file}: {error}; free some space, or resume without "
                "KEY=VALUE"
            ) from None
    deadline = time.monotonic() + _WAIT_S
    while run.recipe() != changed:
        if time.monotonic() > deadline:
            raise UserError(
                f"{run.recipe_file} was not changed within {_WAIT_S:.0f} s; give every rank the "
                "same command, on the same file system"
            )
        time.sleep(0.1)
    try:
        yield
    except UserError:
        if should_report(peers):
            write_atomically(run.recipe_file, old)
        raise


def begin(run: Path, peers: Peers | None, launch: Launch | None) -> NoReturn:
    """Become the worker, or a launcher of several; says how, where a person started it.

    This process is replaced, so that signals and the exit status need no relay.
    """
    if launch is None:
        assert peers is not None
        command, variables = worker_command(run), dict(peers.variables)
    else:
        if launch.launcher == "deepspeed" and launch.endpoint is None and launch.most_nodes == 1:
            # Its own choice is always 29500, which another run may have.
            launch = replace(launch, endpoint=f"127.0.0.1:{free_port()}")
        command = launch_command(launch, run)
        # srun's tasks choose for themselves, on the machine on which they are.
        here = launch.nproc, launch.most_nodes, launch.endpoint
        variables = {} if launch.launcher == "srun" else start_variables(*here, os.environ)
    env = {**os.environ, **variables}
    forget_launch(env, peers if launch is None else None)
    if launch is not None and launch.launcher == "torchrun":  # ours: both listen later
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    if should_report(peers):
        print(f"bigbatch: {describe_start(peers, launch, variables)}", file=sys.stderr)
        stage("importing torch and what the recipe uses")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], command, env)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on this machine; use another --launcher") from None


def describe_start(peers: Peers | None, launch: Launch | None, variables: Mapping[str, str]) -> str:
    """What was chosen for a start, and what the environment had said already, in one line."""
    if launch is not None:
        nodes = "" if launch.nnodes == "1" else f" on each of {launch.nnodes} machines"
        count, launcher = f"{launch.nproc}{nodes}", launch.launcher
        where = launch.endpoint
    else:
        assert peers is not None
        count, launcher = str(peers.size), peers.launcher
        known = {**os.environ, **variables}
        where = f"{known.get('MASTER_ADDR', '')}:{known.get('MASTER_PORT', '')}".strip(":") or None
    words = [f"ranks {count}", f"launcher {launcher}"]
    words += [f"rendezvous {where}"] if where and count != "1" else []
    shown = {name: {**os.environ, **variables}.get(name) for name in CHOSEN}
    words += [f"{name}={value}" for name, value in shown.items() if value is not None]
    return ", ".join(words)
