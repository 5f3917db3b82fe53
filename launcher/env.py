"""Which launcher started this process: the only module that reads launchers' variables.

It also chooses those that torch and its transports read: threads, interface and port.

`bigbatch train` may be started once (it then starts the ranks itself), or once per rank by
torchrun, `accelerate launch`, `deepspeed` or srun. The first three set torchrun's variables;
srun has its own, which are translated. Sources: pytorch.org/docs, "torchrun (Elastic
Launch)"; slurm.schedmd.com/srun.html, "OUTPUT ENVIRONMENT VARIABLES".
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bigbatch.configs.errors import UserError
from bigbatch.configs.notices import notice

# srun's step for the shell of `salloc` (SLURM_INTERACTIVE_STEP): a prompt, not a rank.
_INTERACTIVE_STEP = 0xFFFFFFFA
# Rendezvous ports: below Linux's ephemeral ports (32768 and up), which come and go.
_FIRST_PORT, _PORTS = 10_000, 20_000
# What is chosen here where the environment leaves it open.
CHOSEN = ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# What torchrun, deepspeed and MPI tell a rank; torch and accelerate ask nobody who has set it.
_RENDEZVOUS = re.compile(
    "(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|CROSS_(RANK|SIZE)|LOCAL_SIZE"
    "|(GROUP|ROLE)_(RANK|WORLD_SIZE|NAME)|PMI_(RANK|SIZE)|MPI_LOCAL(RANKID|NRANKS)"
    "|(OMPI|MV2)_COMM_WORLD_.*"
)
_AGENT = re.compile("TORCHELASTIC_.*")


@dataclass(frozen=True)
class Peers:
    """The ranks that another launcher has started, of which this process is one."""

    launcher: str
    rank: int
    local_rank: int
    size: int
    job: str | None  # the same text on every rank and at every restart; None: there is none
    variables: Mapping[str, str] = field(default_factory=dict)  # what torch reads


def find_peers(env: Mapping[str, str]) -> Peers | None:
    """The launcher that started this process as a rank; None: a person did, at a prompt.

    Raises UserError where the variables contradict each other.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _torchrun(env)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        prompt = "SLURM_PTY_PORT" in env or _number(env, "SLURM_STEP_ID") == _INTERACTIVE_STEP
        return None if prompt else _srun(env)
    return None


def check_single(command: str, env: Mapping[str, str]) -> None:
    """Raise UserError where several processes run a command that is one process."""
    peers = find_peers(env)
    if peers is not None and peers.size > 1:
        raise UserError(
            f"{command} is one process, and {peers.launcher} has started {peers.size}; call it once"
        )


def forget_launch(env: MutableMapping[str, str], peers: Peers | None) -> None:
    """Remove what another launch has left in `env`, before ranks are started from it.

    From what a person starts, with a word about it: a variable left from a container, an
    interactive job or another program made a lone process wait for others for ever. A lone
    rank of `peers` needs no rendezvous either, wherever the variables point to.
    """
    if peers is not None and peers.size > 1:
        return
    left = [name for name in env if _RENDEZVOUS.fullmatch(name)]
    if peers is None:
        left += [name for name in env if _AGENT.fullmatch(name)]
        if left:
            said = ", ".join(f"{name}={env[name]}" for name in sorted(left))
            notice(f"{said}: left of another launch, not used for this one")
    for name in left:
        del env[name]


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def default_nproc(env: Mapping[str, str]) -> int:
    """One process per GPU that this process may use; one where there is no GPU."""
    return max(1, len(visible_gpus(env)))


def visible_gpus(env: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [v.strip() for v in visible.split(",") if v.strip() not in ("", "-1")]
    there = sum(p.name[6:].isdecimal() for p in Path("/dev").glob("nvidia[0-9]*"))
    return [str(number) for number in range(there)]


def shares_of_gpus(nproc: int, at_once: int, env: Mapping[str, str]) -> list[list[str]]:
    """GPUs for each of `at_once` runs of `nproc` ranks side by side; none where all may be used.

    Where there are too few for all of them, each run uses the first ones, as a single one does.
    """
    gpus = visible_gpus(env)
    if at_once == 1 or len(gpus) < nproc * at_once:
        return [[] for _ in range(at_once)]
    return [gpus[k * nproc : (k + 1) * nproc] for k in range(at_once)]


def cpus_per_task(env: Mapping[str, str]) -> int | None:
    """The cores that the allocation around this process has for each task; None: no such."""
    return _number(env, "SLURM_CPUS_PER_TASK") if "SLURM_CPUS_PER_TASK" in env else None


def _torchrun(env: Mapping[str, str]) -> Peers:
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    missing = [v for v in ("MASTER_ADDR", "MASTER_PORT") if v not in env]
    if size > 1 and missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set but not {' and '.join(missing)}: start through a "
            "launcher that sets all four, or unset RANK and WORLD_SIZE to start by hand"
        )
    _check(rank, size, "RANK", "WORLD_SIZE")
    # `deepspeed` sets CROSS_RANK; torchrun's run id is the word none unless it was given.
    job = env.get("TORCHELASTIC_RUN_ID", "none")
    launcher = "deepspeed" if "CROSS_RANK" in env else "torchrun"
    # Without LOCAL_RANK (a container each, say), the process has its machine to itself.
    local = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0
    variables = {"LOCAL_RANK": str(local)}
    return Peers(launcher, rank, local, size, None if job == "none" else job, variables)


def _srun(env: Mapping[str, str]) -> Peers:
    rank, size = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
    _check(rank, size, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID")
    per_node = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = _number(env, "SLURM_NODEID")
    local = _number(env, "SLURM_LOCALID")
    local_size = per_node[node] if node < len(per_node) else 1
    if not local < local_size <= size:
        raise UserError(
            f"SLURM_LOCALID={local}, {local_size} tasks on this node and {size} in the step "
            "contradict each other; start through srun, or unset SLURM_PROCID to start by hand"
        )
    nodes = list(hosts(env.get("SLURM_STEP_NODELIST", "")))
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(_FIRST_PORT + (16 * job + step) % _PORTS),
    }
    cores = len(os.sched_getaffinity(0)) // local_size
    if "SLURM_CPUS_PER_TASK" in env:
        cores = _number(env, "SLURM_CPUS_PER_TASK")
    # Every node looks towards another one: the first towards the second, the rest to the first.
    other = nodes[1] if node == 0 and len(nodes) > 1 else nodes[0]
    variables |= _threads(cores, env) | _interface(other, len(nodes), env)
    return Peers("srun", rank, local, size, str(job), variables)


def hosts(nodes: str) -> Iterator[str]:
    """The hosts of SLURM's compressed list: ``gpu[07-09,12],cpu1`` gives gpu07, gpu08, ..."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(f"{nodes},"):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append(nodes[start:at])
            start = at + 1
    for part in parts or [""]:  # a bracket that is never closed makes no part
        yield from _expand(part, nodes)


def _expand(part: str, nodes: str) -> Iterator[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}", part):
            raise UserError(
                f"SLURM_STEP_NODELIST={nodes!r} names no host; start through srun, or unset "
                "SLURM_PROCID to start by hand"
            )
        yield part
        return
    numbers, _, after = rest.partition("]")
    for span in numbers.split(","):
        first, _, last = span.partition("-")
        if not re.fullmatch(r"\d{1,9}", first) or not re.fullmatch(r"\d{0,9}", last):
            yield from _expand("", nodes)
        for number in range(int(first), int(last or first) + 1):
            yield from _expand(f"{before}{number:0{len(first)}d}{after}", nodes)


def start_variables(
    nproc: int, nnodes: int, endpoint: str | None, env: Mapping[str, str]
) -> dict[str, str]:
    """Threads and network interface for `nproc` ranks on this machine, where none are chosen."""
    cores = len(os.sched_getaffinity(0)) // nproc
    other = endpoint.rpartition(":")[0].strip("[]") if endpoint and nnodes > 1 else None
    return _threads(cores, env) | _interface(other, nnodes, env)


def _threads(cores: int, env: Mapping[str, str]) -> dict[str, str]:
    # Without this every rank would take all the cores of the machine.
    return {} if "OMP_NUM_THREADS" in env else {"OMP_NUM_THREADS": str(max(1, cores))}


def _interface(other: str | None, nnodes: int, env: Mapping[str, str]) -> dict[str, str]:
    """The network interface that leads to `other`, a host that takes part; one machine: lo.

    Left alone, gloo takes the address that this machine's own name stands for: on Debian
    often 127.0.1.1, which no other machine can reach; and a name that stands for nothing
    costs seconds.
    """
    chosen = {"GLOO_SOCKET_IFNAME": "lo"} if nnodes == 1 and _has_loopback() else {}
    name = interface_to(other) if nnodes > 1 and other else None
    if name is not None:
        # NCCL takes the value for the start of a name, unless = stands before it.
        chosen = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    return {key: value for key, value in chosen.items() if key not in env}


def interface_to(host: str) -> str | None:
    """The interface whose address this machine would use towards `host`; None: unknown."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.split("%")[0] == own for found in addresses):
            # The host's own name may stand for a loopback address: no way to the others.
            return None if own.startswith("127.") and own != address[0] else name
    return None


def _has_loopback() -> bool:
    return "lo" in psutil.net_if_addrs()


def tasks_per_node(text: str) -> list[int]:
    """Tasks on each node from SLURM's compressed form: ``4(x2),1`` gives [4, 4, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part)
        if match is None:
            raise UserError(
                f"SLURM_STEP_TASKS_PER_NODE={text!r} is not a list such as 4(x2),1; start "
                "through srun, or unset SLURM_PROCID to start by hand"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not re.fullmatch(r"[0-9]{1,18}", value):
        found = f"{name}={value!r}" if name in env else f"{name} is not set; it"
        raise UserError(
            f"{found} must be a whole number; start through the launcher that sets it, or unset "
            "RANK, WORLD_SIZE and SLURM_PROCID to start by hand"
        )
    return int(value)


def _check(rank: int, size: int, rank_name: str, size_name: str) -> None:
    if rank >= size:
        raise UserError(
            f"{rank_name}={rank} must be below {size_name}={size}; unset both to start by hand"
        )
