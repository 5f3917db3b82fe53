"""A real SLURM of four nodes on this machine: one munged, one slurmctld, four slurmd.

As root, with Debian's slurm-wlm and munge. Nodes n1 to n4 differ by the port of their
slurmd. Jobs of the partition `urgent` preempt those of `batch`, which are requeued.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.rundir import RunDir

HOSTS = Path("/etc/hosts")
HOSTS_LINE = "127.0.0.1 n1 n2 n3 n4 # of tests/helpers/slurm_cluster.py\n"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue")
NODES = ("n1", "n2", "n3", "n4")
BIGBATCH = Path(sys.executable).parent / "bigbatch"
WAITING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "PREEMPTED", "REQUEUED")


@dataclass
class Cluster:
    """The daemons, by name or by node; clients find them through `env`."""

    folder: Path
    env: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.txt").open("ab") as log:
            self.daemons[name] = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

    def start_slurmd(self, node: str) -> None:
        self.start(node, "slurmd", "-D", "-N", node, "-f", self.env["SLURM_CONF"])

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL of the daemon alone; the steps on its node live on (KillMode=process)."""
        self.daemons[node].kill()
        self.daemons[node].wait()

    def wait_until_idle(self) -> None:
        _wait(lambda: _idle(self.env) == len(NODES), "the nodes", self.folder)

    def cut_power(self, node: str) -> None:
        """SIGKILL of all that runs on a node: its daemon, its steps, and what these started."""
        mine = {"SLURMD_NODENAME": node, "SLURM_CONF": self.env["SLURM_CONF"]}
        tasks = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if mine.items() <= process.environ().items():
                    tasks.append(process)
        steps = {p for task in tasks for p in [task.parent()] if p and "slurmstepd" in p.name()}
        # Who would report the deaths dies first.
        self.kill_slurmd(node)
        for process in (*steps, *tasks):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@dataclass
class Place:
    """A folder that runs of digits are submitted from, with these changes to the recipe."""

    folder: Path
    cluster: Cluster
    changes: Sequence[str]

    def call(self, *command: object, status: int = 0) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env=self.cluster.env,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def submit(self, name: str, *options: str, changes: Sequence[str] | None = None) -> str:
        changes = self.changes if changes is None else changes
        command = [BIGBATCH, "submit", "digits", *changes, "--run", name, "--json", "--no-check"]
        command += options
        return str(json.loads(self.call(*command, "--cpus-per-rank", "1"))["job"])

    def state(self, job: str) -> str:
        """The job's state and exit status, such as COMPLETED 0:0."""
        words = self.call("scontrol", "show", "job", "-o", job).split()
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        return f"{fields['JobState']} {fields['ExitCode']}"

    def wait(self, job: str, state: str, limit_s: float = 900) -> None:
        deadline = time.monotonic() + limit_s
        while (now := self.state(job)) != state:
            assert now.split()[0] in WAITING, f"{now}, not {state}"
            assert time.monotonic() < deadline, f"{now}, not {state}"
            time.sleep(0.5)

    def wait_for_step(self, job: str, name: str, step: int) -> None:
        """Until the run has a record of `step`, or its job runs where that is 0."""
        while True:
            state = self.state(job).split()[0]
            assert state in WAITING, state
            if any(r["step"] >= step for r in read_jsonl(self.run(name).metrics)):
                return
            if step == 0 and state == "RUNNING":
                return
            time.sleep(0.1)

    def preempt(self, job: str | None = None) -> None:
        """Take the whole cluster for a moment, or the node of a job, at a higher priority."""
        nodes = ["-N", "4"]
        if job is not None:
            nodes = ["-w", self.call("squeue", "-h", "-j", job, "-o", "%N").strip()]
        urgent = ["sbatch", "--parsable", "-p", "urgent", *nodes, "--exclusive", "--wrap=true"]
        self.wait(self.call(*urgent, "--output=/dev/null").strip(), "COMPLETED 0:0")

    def run(self, name: str) -> RunDir:
        return RunDir(self.folder / "runs" / name)


def missing() -> str | None:
    """Why this machine cannot run a cluster; None where it can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [p for p in PROGRAMS if shutil.which(p, path=_path()) is None]
    return f"needs {', '.join(absent)}: sh tests/install_slurm.sh" if absent else None


@contextmanager
def slurm_cluster(folder: Path, cpus: int = 4, patience_s: int = 60) -> Iterator[Cluster]:
    """Start a cluster that keeps its files in `folder`.

    A node whose slurmd has not answered for `patience_s` is down.
    """
    for name in ("ctld", "spool", "log"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    config = folder / "slurm.conf"
    config.write_text(_config(folder, cpus, patience_s))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    env = {**os.environ, "PATH": f"{BIGBATCH.parent}:{_path()}", "SLURM_CONF": str(config)}
    env |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    hosts = HOSTS.read_text()
    cluster = Cluster(folder, env)
    try:
        HOSTS.write_text(hosts + HOSTS_LINE)
        cluster.start(
            *("munged", "munged", "--foreground", "--force", f"--key-file={key}"),
            *(f"--socket={folder}/munge.sock", f"--pid-file={folder}/munge.pid"),
            *(f"--log-file={folder}/log/munge.log", f"--seed-file={folder}/munge.seed"),
        )
        _wait(lambda: (folder / "munge.sock").exists(), "munged", folder)
        cluster.start("slurmctld", "slurmctld", "-D", "-i", "-f", str(config))
        for node in NODES:
            cluster.start_slurmd(node)
        cluster.wait_until_idle()
        yield cluster
    finally:
        # A step outlives its slurmd; cancelled jobs take theirs along.
        subprocess.run(["scancel", "--user=root", "--quiet"], env=env, check=False, timeout=60)
        deadline = time.monotonic() + 40
        while _jobs(env) and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(cluster.daemons.values()):
            daemon.terminate()
        for daemon in cluster.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        HOSTS.write_text(HOSTS.read_text().replace(HOSTS_LINE, "", 1))


def _config(folder: Path, cpus: int, patience_s: int) -> str:
    host = socket.gethostname().split(".")[0]
    controller, *nodes = _free_ports(5)
    node_lines = "\n".join(
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
        "RealMemory=4000 State=UNKNOWN"
        for i, port in enumerate(nodes, 1)
    )
    # cred_expire bounds how long a requeued job waits before it may start again (default:
    # two minutes). A preempted job gets its own signal first, then SIGTERM, and GraceTime.
    # Ranks meet at a port that follows from the job's number: two clusters here need others.
    return f"""\
ClusterName=bigbatch-test
FirstJobId={os.getpid() % 1000 + 1}
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
SlurmdTimeout={patience_s}
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
