"""Ranks of a module here: started together, ended together. For what needs no restarts."""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

from bigbatch.configs.errors import UserError
from bigbatch.launcher.env import (
    Peers,
    default_nproc,
    forget_launch,
    free_port,
    start_variables,
)
from bigbatch.launcher.launchers import python
from bigbatch.trainers.recovery.signals import catch
from bigbatch.trainers.warm.parent import start_parent

_POLL_S = 0.05
_GRACE_S = 10.0  # that ranks have to end by themselves once one has failed


def run_ranks(
    module: str, arguments: Sequence[str], peers: Peers | None, nproc: int | None
) -> NoReturn:
    """Run `module` as `nproc` ranks, or as the one rank that a launcher has made this process.

    Without `nproc`, a rank for each GPU. Does not return: exits with the status of the first
    rank that failed, or 0.
    """
    command = [*python(module), *arguments]
    if peers is not None and (nproc is None or peers.size > 1):
        if nproc is not None:
            raise UserError(
                f"--nproc {nproc}, but {peers.launcher} has started {peers.size} processes "
                "already: drop --nproc to use those"
            )
        env = {**os.environ, **peers.variables}
        forget_launch(env, peers)
        _become(command, env)
    count = nproc or default_nproc(os.environ)
    env = {**os.environ, **start_variables(count, 1, None, os.environ)}
    forget_launch(env, None)
    if count == 1:
        _become(command, env)
    sys.exit(_run(command, [f"{module}.__main__"], count, env))


def _become(command: list[str], env: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, env)


def _run(command: list[str], modules: Sequence[str], count: int, env: Mapping[str, str]) -> int:
    """Start the ranks, wait for them, and end the others where one fails.

    They are forked from one process that imports `modules`: once, and not in each of them.
    """
    port = free_port()
    parent = start_parent(modules, env)
    ranks = []
    for rank in range(count):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ranks.append(parent.popen(command, env={**env, **own}))
    parent.close()

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            process.send_signal(number)

    catch(forward, signal.SIGTERM, signal.SIGHUP)
    signal.signal(signal.SIGINT, lambda number, frame: None)  # a terminal tells all of them
    failed = 0
    deadline, ending = float("inf"), signal.SIGTERM
    while True:
        statuses = [process.poll() for process in ranks]
        if not failed and any(statuses):
            # Those that lost a peer end by it: one that a signal has ended says more.
            failed, deadline = min(filter(None, statuses)), time.monotonic() + _GRACE_S
            if failed == -signal.SIGKILL:  # which leaves nobody there to say why
                print(
                    f"bigbatch: rank {statuses.index(failed)} was killed (SIGKILL), as the kernel "
                    "does where memory runs out: use a smaller --batch, or fewer processes",
                    file=sys.stderr,
                )
        if None not in statuses:
            break
        if time.monotonic() > deadline:  # asked first, for they may have something to remove
            for process in ranks:
                process.send_signal(ending)
            ending, deadline = signal.SIGKILL, time.monotonic() + _GRACE_S
        time.sleep(_POLL_S)
    status = 2 if 2 in statuses else failed  # a user's error explains the others
    return status if status >= 0 else 128 - status
