"""A real SLURM of four nodes on this machine: one munged, one slurmctld, four slurmd.

As root, with Debian's slurm-wlm and munge. Nodes n1 to n4 differ by the port of their
slurmd. Jobs of the partition `urgent` preempt those of `batch`, which are requeued.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOSTS = Path("/etc/hosts")
HOSTS_LINE = "127.0.0.1 n1 n2 n3 n4 # of tests/slurm_cluster.py\n"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue")


def missing() -> str | None:
    """Why this machine cannot run a cluster; None where it can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [p for p in PROGRAMS if shutil.which(p, path=_path()) is None]
    return f"needs {', '.join(absent)}: sh tests/install_slurm.sh" if absent else None


@contextmanager
def slurm_cluster(folder: Path, cpus: int = 4) -> Iterator[dict[str, str]]:
    """Start a cluster that keeps its files in `folder`; yields variables for its clients."""
    for name in ("ctld", "spool", "log"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    config = folder / "slurm.conf"
    config.write_text(_config(folder, cpus))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    env = {**os.environ, "PATH": _path(), "SLURM_CONF": str(config)}
    hosts = HOSTS.read_text()
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        log = (folder / "log" / f"{len(daemons)}-{command[0]}.txt").open("wb")
        daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))

    try:
        HOSTS.write_text(hosts + HOSTS_LINE)
        start(
            *("munged", "--foreground", "--force", f"--key-file={key}"),
            *(f"--socket={folder}/munge.sock", f"--pid-file={folder}/munge.pid"),
            *(f"--log-file={folder}/log/munge.log", f"--seed-file={folder}/munge.seed"),
        )
        _wait(lambda: (folder / "munge.sock").exists(), "munged", folder)
        start("slurmctld", "-D", "-i", "-f", str(config))
        for node in range(1, 5):
            start("slurmd", "-D", "-N", f"n{node}", "-f", str(config))
        _wait(lambda: _idle(env) == 4, "the nodes", folder)
        yield env
    finally:
        # A step outlives its slurmd; cancelled jobs take theirs along.
        subprocess.run(["scancel", "--user=root", "--quiet"], env=env, check=False, timeout=60)
        deadline = time.monotonic() + 40
        while _jobs(env) and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        HOSTS.write_text(HOSTS.read_text().replace(HOSTS_LINE, ""))


def _config(folder: Path, cpus: int) -> str:
    host = socket.gethostname().split(".")[0]
    controller, *nodes = _free_ports(5)
    node_lines = "\n".join(
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
        "RealMemory=4000 State=UNKNOWN"
        for i, port in enumerate(nodes, 1)
    )
    # cred_expire bounds how long a requeued job waits before it may start again (default:
    # two minutes). A preempted job gets its own signal first, then SIGTERM, and GraceTime.
    return f"""\
ClusterName=bigbatch-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
KillWait=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{node_lines}
PartitionName=batch Nodes=n[1-4] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-4] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _idle(env: dict[str, str]) -> int:
    command = ["sinfo", "-h", "-p", "batch", "-t", "idle", "-o", "%D"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


def _jobs(env: dict[str, str]) -> bool:
    done = subprocess.run(["squeue", "-h"], env=env, capture_output=True, text=True, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())


def _wait(ready: object, what: str, folder: Path, limit_s: float = 60) -> None:
    assert callable(ready)
    deadline = time.monotonic() + limit_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come up within {limit_s:.0f} s; see {folder}/log")
        time.sleep(0.2)


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
