"""torchrun's elastic agent, started by `bigbatch train` once per machine.

    python -m bigbatch.trainers.agent --nproc N [--nnodes M --rdzv-endpoint HOST:PORT] RUN_DIR

Starts `bigbatch.trainers.worker` once per rank, passes signals on to the ranks and waits
for them, and exits with the status of the rank that ended first with one other than 0.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from bigbatch.trainers.signals import SAVED

# What a rank is sent for what the agent gets. An interpreter that is still importing answers
# SIGINT with a traceback, and a closed terminal (SIGHUP) is a reason to save like any other.
FORWARD = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


class Signals:
    """Passes signals on to the ranks, which save and exit; a second Ctrl-C kills them."""

    def __init__(self) -> None:
        self.sent: set[int] = set()
        self.interrupts = 0
        for number in FORWARD:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, self._forward)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        forwarded = signal.SIGKILL if self.interrupts > 1 else FORWARD[signal.Signals(number)]
        self.sent.add(forwarded)
        ranks = psutil.Process().children()
        if not ranks:
            sys.exit(SAVED)  # still waiting for the other machines: there is nothing to save
        for process in ranks:
            try:
                process.send_signal(forwarded)  # to the rank alone: it looks after its children
            except psutil.NoSuchProcess:
                continue


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.agent")
    parser.add_argument("run", type=Path)
    parser.add_argument("--nproc", type=int, required=True, help="ranks on this machine")
    parser.add_argument("--nnodes", default="1", help="machines: a number, or MIN:MAX")
    parser.add_argument("--rdzv-endpoint", default="localhost:0", help="HOST:PORT of one of them")
    parser.add_argument("--stop-at", type=int, help="end after this many steps, unfinished")
    options = parser.parse_args(arguments)

    threads = max(1, len(os.sched_getaffinity(0)) // options.nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The agent reports each exit of a rank at length. The ranks have said why themselves.
    logging.disable(logging.ERROR)
    limit = [] if options.stop_at is None else ["--stop-at", str(options.stop_at)]
    worker = ["-P", "-m", "bigbatch.trainers.worker", *limit, str(options.run)]
    signals = Signals()
    with tempfile.TemporaryDirectory(prefix="bigbatch-agent-") as folder:
        config = LaunchConfig(
            min_nodes=int(options.nnodes.split(":")[0]),
            max_nodes=int(options.nnodes.split(":")[-1]),
            nproc_per_node=options.nproc,
            run_id=options.run.name,
            rdzv_backend="c10d",
            rdzv_endpoint=options.rdzv_endpoint,
            # One machine needs no host name, which may take seconds to look up.
            local_addr="localhost" if options.nnodes == "1" else None,
            max_restarts=0,  # a run goes on from its checkpoint by a new start, not in here
            logs_specs=DefaultLogsSpecs(log_dir=folder),  # output stays on the terminal
            signals_to_handle="SIGQUIT",  # the others are handled above
        )
        try:
            launch_agent(config, sys.executable, worker)
        except ChildFailedError as error:
            # The others lose their connections to a rank that ends with a message.
            said = [found for found in error.failures.items() if found[1].exitcode == 2]
            rank, failure = said[0] if said else error.get_first_failure()
            return explain(failure.exitcode, rank, signals.sent, options.run)
        except RendezvousError as error:
            print(
                f"bigbatch: the {options.nnodes} machines did not meet at "
                f"{options.rdzv_endpoint}: {error}; start the same command on each, with the "
                "address of one of them",
                file=sys.stderr,
            )
            return 2
    return 0


def explain(status: int, rank: int, sent: set[int], run: Path) -> int:
    """The agent's exit status for the first rank's; says what the rank could not say itself."""
    go_on = f"go on with `bigbatch resume {run}`"
    if status < 0 and -status in sent and -status != signal.SIGKILL:
        # It came before the rank could listen.
        print(f"bigbatch: stopped before the first step; {go_on}", file=sys.stderr)
        return SAVED
    elif status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if name == "SIGKILL" and not sent else ""
        print(f"bigbatch: rank {rank} was killed by {name}{hint}; {go_on}", file=sys.stderr)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
