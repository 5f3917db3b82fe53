"""torchrun's elastic agent, started by `bigbatch train` once per machine.

    python -m bigbatch.trainers.agent --nproc N [--nnodes M|MIN:MAX --rdzv-endpoint HOST:PORT]
        RUN_DIR

Starts `bigbatch.trainers.worker` once per rank, passes signals on to the ranks and waits for
them. Ranks are forks of a process that has imported what they need (`trainers/warm/`). Ranks
that crash, hang or lose a machine are all started again, from the newest checkpoint: on as many
machines as are left, if those are enough. Exits with the status of the rank that ended first with
one other than 0.
"""

import argparse
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":
    gc.disable()  # while it imports, as the worker does

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing import api as processes
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.monitoring.output import leave
from bigbatch.trainers.recovery.signals import SAVED, STALLED
from bigbatch.trainers.recovery.stored import list_checkpoints
from bigbatch.trainers.warm.parent import OF_A_RANK, WORKER, Parent, fork_parent

# How long the machines that are there wait for more, where fewer than all are enough.
_LAST_CALL_S = 15
# A machine may be up before its name is known to the others.
_NAME_S = 20.0

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

    def __init__(self, parent: Parent, run: Path) -> None:
        self.sent: set[int] = set()
        self._run = run
        self.interrupts = 0
        self._parent = parent  # a child as well, and no rank
        for number in FORWARD:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, self._forward)
        # The launcher holds signals back until somebody listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, tuple(FORWARD))

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        forwarded = signal.SIGKILL if self.interrupts > 1 else FORWARD[signal.Signals(number)]
        self.sent.add(forwarded)
        ranks = [p for p in psutil.Process().children() if p.pid != self._parent.pid]
        if not ranks:  # it waits for the other machines, or they have just ended: nothing to save
            name = signal.Signals(number).name
            go_on = f"go on with `bigbatch resume {self._run}`"
            print(f"bigbatch: {name} while no rank ran; {go_on}", file=sys.stderr, flush=True)
            sys.exit(SAVED)
        for process in ranks:
            try:
                process.send_signal(forwarded)  # to the rank alone: it looks after its children
            except psutil.NoSuchProcess:
                continue


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.agent")
    parser.add_argument("run", type=Path)
    parser.add_argument("--nproc", type=int, required=True, help="ranks on this machine")
    parser.add_argument("--nnodes", type=node_range, default=(1, 1), help="N or MIN:MAX machines")
    parser.add_argument("--rdzv-endpoint", default="localhost:0", help="HOST:PORT of one of them")
    parser.add_argument("--max-restarts", type=int, default=3, help="without any progress")
    parser.add_argument("--stop-at", type=int, help="end after this many steps, unfinished")
    options = parser.parse_args(arguments)

    began = dict(os.environ)
    threads = max(1, len(os.sched_getaffinity(0)) // options.nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # Which signals torch turns into a SignalException; the others are handled above.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    # Rank 0 opens a store for each start. The agent's own would outlive a restart, and with it
    # the addresses of dead ranks, which the new ones then try to reach for ten minutes.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    limit = [] if options.stop_at is None else ["--stop-at", str(options.stop_at)]
    worker = ["-P", "-m", WORKER, *limit, str(options.run)]
    # While this process is one thread, and not in what an end would clean up.
    parent = fork_parent(OF_A_RANK, began)
    gc.freeze()
    gc.enable()
    fork_ranks_from(parent)
    # The agent reports each exit of a rank at length. The ranks have said why themselves.
    logging.disable(logging.ERROR)
    signals = Signals(parent, options.run)
    fewest, most = options.nnodes
    agent: Agent | None = None
    rendezvous: RendezvousHandler | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="bigbatch-agent-") as folder:
            rendezvous = meet(options.run.name, options.rdzv_endpoint, fewest, most)
            spec = WorkerSpec(
                role="rank",
                local_world_size=options.nproc,
                entrypoint=sys.executable,
                args=tuple(worker),
                rdzv_handler=rendezvous,
                max_restarts=options.max_restarts,
                monitor_interval=0.1,
                # One machine needs no host name, which may take seconds to look up.
                local_addr="localhost" if most == 1 else None,
            )
            # Output stays on the terminal.
            agent = Agent(spec, DefaultLogsSpecs(log_dir=folder), options.run, signals)
            result = agent.run()
    except RendezvousError as error:
        if agent is not None and agent.started:
            print(
                f"bigbatch: the other machines are gone ({error}); go on with "
                f"`bigbatch resume {options.run}`",
                file=sys.stderr,
            )
            return SAVED
        print(
            f"bigbatch: the {most} machines did not meet at {options.rdzv_endpoint}: {error}; "
            "start the same command on each, with the address of one of them",
            file=sys.stderr,
        )
        return 2
    finally:
        if rendezvous is not None:
            rendezvous.shutdown()
    if result.is_failed():
        # The others lose their connections to a rank that ends with a message.
        explained = [found for found in result.failures.items() if found[1].exitcode == 2]
        first = min(result.failures.items(), key=lambda item: item[1].timestamp)
        rank, failure = explained[0] if explained else first
        return explain(failure.exitcode, rank, signals.sent, options.run)
    return 0


def fork_ranks_from(parent: Parent) -> None:
    """Let torch's agent start its processes there; it has no parameter for who does."""

    class Rank(SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            return parent.popen(
                args, env=env, stdout=self._stdout, stderr=self._stderr, start_new_session=True
            )

    processes.get_subprocess_handler = Rank  # type: ignore[assignment]


def meet(run: str, endpoint: str, fewest: int, most: int) -> RendezvousHandler:
    """Where the machines of a run find each other; one of them keeps it, at HOST:PORT.

    Raises RendezvousError for a host that nobody knows: torch would try it for minutes.
    """
    host = endpoint.rpartition(":")[0].strip("[]")
    deadline = time.monotonic() + _NAME_S
    while True:
        try:
            socket.getaddrinfo(host, None)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(f"{host}: {error.strerror}") from None
            time.sleep(1)
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=endpoint,
            run_id=run,
            min_nodes=fewest,
            max_nodes=most,
            local_addr="localhost" if most == 1 else None,
            last_call_timeout=_LAST_CALL_S,
        )
    )


class Agent(LocalElasticAgent):
    """Starts the ranks again where that can help: not after a user's error, nor a signal.

    The restarts count from the last one that made progress, so that a long run outlives any
    number of failures, and a step that always fails ends it.
    """

    def __init__(
        self, spec: WorkerSpec, logs: DefaultLogsSpecs, run: Path, signals: Signals
    ) -> None:
        super().__init__(spec, logs)
        self._run_path = run
        self._signals = signals
        self._seen: set[str] = set()  # names of checkpoints
        self.started = False

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.started = True
        result = super()._monitor_workers(worker_group)
        if not result.is_failed():
            return result
        statuses = {rank: failure.exitcode for rank, failure in result.failures.items()}
        checkpoints = list_checkpoints(RunDir(self._run_path).checkpoints)
        newest = checkpoints[0].name if checkpoints else ""
        names = {path.name for path in checkpoints}
        if not names <= self._seen:
            self._seen |= names
            self._remaining_restarts = worker_group.spec.max_restarts
        # The others are ended by torch's agent, with statuses of their own.
        rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
        status = failure.exitcode
        if self._signals.sent or 2 in statuses.values() or status == SAVED:
            self._remaining_restarts = 0
        if self._remaining_restarts > 0:
            print(
                f"bigbatch: rank {rank} {how_it_ended(status)}; all ranks start again from "
                f"{newest or 'the beginning'} (restarts left: {self._remaining_restarts - 1})",
                file=sys.stderr,
            )
        return result


def node_range(text: str) -> tuple[int, int]:
    """``4`` gives (4, 4), ``2:4`` gives (2, 4)."""
    first, _, last = text.partition(":")
    found = int(first), int(last or first)
    if not 1 <= found[0] <= found[1]:
        raise ValueError(f"--nnodes {text} is no count of machines; use N or MIN:MAX")
    return found


def explain(status: int, rank: int, sent: set[int], run: Path) -> int:
    """The agent's exit status for the first rank's; says what the rank could not say itself."""
    go_on = f"go on with `bigbatch resume {run}`"
    if status < 0 and -status in sent and -status != signal.SIGKILL:
        # It came before the rank could listen.
        print(f"bigbatch: stopped before the first step; {go_on}", file=sys.stderr)
        return SAVED
    if status == STALLED:
        return SAVED
    if status < 0:
        print(f"bigbatch: rank {rank} {how_it_ended(status)}; {go_on}", file=sys.stderr)
    return status if status >= 0 else 128 - status


def how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


if __name__ == "__main__":
    leave(main())
