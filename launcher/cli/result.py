"""--json of commands that become a run: talk goes to standard error, the result is one object."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.launcher.cli import options
from bigbatch.launcher.env import Peers

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


def check_alone(peers: Peers | None) -> None:
    """Raise UserError where this process is one of several, each of which would print."""
    if peers is not None:
        raise UserError(
            f"--json is for a run that this command starts, and {peers.launcher} has started it as "
            "one of several processes; leave it out, and ask `bigbatch status RUN --json`"
        )


def standing(path: Path, status: int = 0) -> dict[str, Any]:
    """Where a run stands, as `bigbatch status` has it, and the exit status of its last start."""
    from bigbatch.launcher.runs import registry

    return {**registry.status(RunDir(path)), "exit_status": status}


def report_run(path: Path) -> None:
    """Go on in a child, which may become the run at `path`; this process ends with its status.

    It passes signals on, waits, and then prints where the run stands. A Ctrl-C reaches the child
    by itself.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in _PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:  # SIGHUP under nohup
            signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_SETMASK, held)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = status if status >= 0 else 128 - status  # as shells say it
    options.print_json(standing(path, status))
    sys.exit(status)
