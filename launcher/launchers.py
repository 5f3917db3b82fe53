"""The argument list of each launcher: pure functions, golden-tested.

All of them start `bigbatch.trainers.worker` once per rank, or a process that becomes it.
torchrun is our own agent around torchrun's elastic one, because that one answers signals by
killing the ranks; accelerate and deepspeed do so as well, and are here for sites that are
built around them.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from bigbatch.configs.errors import UserError

LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "srun")
_NODES = re.compile(r"([1-9]\d{0,4})(?::([1-9]\d{0,4}))?")
_ENDPOINT = re.compile(r"[A-Za-z0-9_.-]{1,253}:\d{1,5}|\[[0-9A-Fa-f:.]{2,45}\]:\d{1,5}")


@dataclass(frozen=True)
class Launch:
    """How the ranks of a run are started on this machine, and on others like it."""

    launcher: str = "torchrun"
    nproc: int = 1  # ranks on each machine
    nnodes: str = "1"  # machines: a number, or MIN:MAX of torchrun
    endpoint: str | None = None  # HOST:PORT of one of the machines
    node_rank: int | None = None  # of this machine, for accelerate
    hostfile: Path | None = None  # of deepspeed: lines of `host slots=N`
    cpus: int | None = None  # cores of each rank, for srun

    def __post_init__(self) -> None:
        match = _NODES.fullmatch(self.nnodes)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(f"--nnodes {self.nnodes!r} is not allowed; write it like 2, or 2:8")
        if self.endpoint is not None and not (
            _ENDPOINT.fullmatch(self.endpoint)
            and 1 <= int(self.endpoint.rpartition(":")[2]) <= 65_535
        ):
            raise UserError(
                f"--rdzv-endpoint {self.endpoint!r} is not allowed; write it like node1:29400, "
                "with a port from 1 to 65535"
            )
        if match[2] and self.launcher != "torchrun":
            raise UserError(f"--nnodes MIN:MAX is torchrun's; {self.launcher} takes a number")
        if self.hostfile is not None and self.launcher != "deepspeed":
            raise UserError("--hostfile is deepspeed's; add --launcher deepspeed")
        if self.node_rank is not None and self.launcher != "accelerate":
            raise UserError("--node-rank is accelerate's; add --launcher accelerate")
        if self.most_nodes > 1 and self.launcher in ("torchrun", "accelerate"):
            if self.endpoint is None:
                raise UserError(
                    f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT and --run NAME, the "
                    "same on each machine"
                )
            if self.launcher == "accelerate" and self.node_rank is None:
                raise UserError("accelerate numbers its machines: add --node-rank 0, 1, ...")
        if self.most_nodes > 1 and self.launcher == "deepspeed" and self.hostfile is None:
            raise UserError("deepspeed finds its machines in a file: add --hostfile FILE")

    @property
    def most_nodes(self) -> int:
        return int(self.nnodes.split(":")[-1])

    @property
    def most_ranks(self) -> int:
        return self.nproc * self.most_nodes


def launch_command(launch: Launch, run: Path, stop_at: int | None = None) -> list[str]:
    """The argument list that trains the run in `run`, which exists."""
    if launch.launcher == "accelerate":
        return _accelerate(launch, worker_command(run, stop_at))
    if launch.launcher == "deepspeed":
        return _deepspeed(launch, worker_command(run, stop_at))
    if launch.launcher == "srun":
        return _srun(launch, run)
    return _torchrun(launch, run, stop_at)


def worker_command(run: Path, stop_at: int | None = None) -> list[str]:
    """The argument list that runs one rank."""
    limit = [] if stop_at is None else ["--stop-at", str(stop_at)]
    return [*python("bigbatch.trainers.worker"), *limit, str(run)]


def python(module: str) -> list[str]:
    # -P: the current folder is not searched for modules, as with the `bigbatch` script.
    return [sys.executable, "-P", "-m", module]


def _torchrun(launch: Launch, run: Path, stop_at: int | None) -> list[str]:
    if launch.most_ranks == 1:
        return worker_command(run, stop_at)  # nothing to coordinate: start sooner
    command = [*python("bigbatch.trainers.agent"), "--nproc", str(launch.nproc)]
    if launch.most_nodes > 1:
        command += ["--nnodes", launch.nnodes, "--rdzv-endpoint", str(launch.endpoint)]
    if stop_at is not None:
        command += ["--stop-at", str(stop_at)]
    return [*command, str(run)]


def _accelerate(launch: Launch, worker: list[str]) -> list[str]:
    host, _, port = (launch.endpoint or "127.0.0.1:0").rpartition(":")
    options = [
        *(["--multi_gpu"] if launch.most_ranks > 1 else []),
        *("--num_processes", str(launch.most_ranks)),
        *("--num_machines", launch.nnodes),
        *("--machine_rank", str(launch.node_rank or 0)),
        *(["--main_process_ip", host] if launch.most_nodes > 1 else []),
        *("--main_process_port", port),
        # The recipe says what they would: precision, and no compilation.
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ]
    module = worker[worker.index("-m") :]
    return [*python("accelerate.commands.launch"), *options, *module]


def _deepspeed(launch: Launch, worker: list[str]) -> list[str]:
    options = ["--no_local_rank"]
    if launch.hostfile is not None:
        options += ["--hostfile", str(launch.hostfile), "--num_nodes", launch.nnodes]
    options += ["--num_gpus", str(launch.nproc)]
    if launch.endpoint is not None:
        host, _, port = launch.endpoint.rpartition(":")
        options += ["--master_addr", host, "--master_port", port]
    module = worker[worker.index("-m") + 1 :]
    return [*python("deepspeed.launcher.runner"), *options, "--module", *module]


def _srun(launch: Launch, run: Path) -> list[str]:
    """Inside an allocation, or asking for one; each task finds its rank in srun's variables."""
    options = [
        *("srun", "--mpi=none", "--kill-on-bad-exit=1", f"--nodes={launch.nnodes}"),
        f"--ntasks-per-node={launch.nproc}",
        *([f"--cpus-per-task={launch.cpus}"] if launch.cpus else []),
    ]
    # As in slurm/train.sbatch: no signal may end a rank before Python is there to keep it.
    deaf = ["bash", "-c", 'trap "" TERM USR2; exec "$@"', "rank"]
    return [*options, *deaf, *python("bigbatch.launcher.cli"), "resume", str(run)]
