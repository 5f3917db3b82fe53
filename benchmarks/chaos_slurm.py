"""Faults of runs on SLURM: preemption, and the death of a node, of a slurmd, of a rank, of srun."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from chaos_faults import RECIPE, STEPS, Fault, NewRun, Run, until

from bigbatch.data.writing.shard import shard
from bigbatch.trainers.monitoring.wandb_view import history_steps

sys.path.append(str(Path(__file__).parents[1]))  # for the tests' cluster
from tests.helpers.slurm_cluster import BIGBATCH, WAITING, Place, missing, slurm_cluster

__all__ = ["FAULTS", "KINDS", "QUICK", "machine", "missing", "slurm_runs"]

NODES, RANKS_PER_NODE = 2, 2
SLURM_RECIPE = [f"duration={STEPS} steps", *RECIPE]
# A job whose node failed is on its way back into the queue.
QUEUED = (*WAITING, "NODE_FAIL")


class SlurmRun(Run):
    """A run submitted to SLURM, and resubmitted where its job ends for good."""

    def __init__(self, place: Place, name: str) -> None:
        super().__init__(place.run(name))
        self.place = place
        self.job = ""
        self.status: int | None = None
        self.asked = 0.0

    def start(self) -> None:
        if self.job:
            self.job = self.place.call(BIGBATCH, "resume", self.run.name, "--slurm").strip()
        else:
            size = ("--nodes", str(NODES), "--ranks-per-node", str(RANKS_PER_NODE))
            self.job = self.place.submit(self.run.name, *size)
        self.status = None

    def ended(self) -> int | None:
        # Each question is a process of its own, and this is asked many times a second.
        if self.status is None and time.monotonic() > self.asked + 0.5:
            state, status = self.place.state(self.job).split()
            if state not in QUEUED:
                self.status = 0 if state == "COMPLETED" else int(status.split(":")[0]) or 1
            self.asked = time.monotonic()
        return self.status

    def stop(self) -> None:
        if self.ended() is None:
            self.place.call("scancel", self.job)
            until(lambda: self.ended() is not None, 60)

    def output(self) -> str:
        return "".join(file.read_text() for file in sorted(self.run.path.glob("slurm-*.out")))

    def state(self) -> dict[str, Any]:
        """Also wandb's: one run over all starts, with each step once."""
        files = list((self.run.path / "wandb").glob("offline-run-*/*.wandb"))
        steps = sorted(step for file in files for step in history_steps(file))
        wandb = {"runs": len({file.name for file in files}), "steps": steps}
        return {**super().state(), "wandb": wandb}

    def node(self, rng: random.Random) -> str | None:
        """One of the nodes that the job runs on; None while it waits."""
        name = self.place.call("squeue", "-h", "-t", "R", "-j", self.job, "-o", "%N").strip()
        hosts = self.place.call("scontrol", "show", "hostnames", name).split() if name else []
        return rng.choice(hosts) if hosts else None

    def process(self, word: str, **variables: object) -> psutil.Process | None:
        """A process of the job with `word` in its command and these variables; None: no such."""
        wanted = {"SLURM_JOB_ID": self.job, **{k: str(v) for k, v in variables.items()}}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if word in process.cmdline() and wanted.items() <= process.environ().items():
                    return process
        return None


def preempt(run: SlurmRun, rng: random.Random) -> str:
    time.sleep(rng.random())
    run.place.preempt()
    return "by a job on all four nodes, which has ended"


def kill_slurmd(run: SlurmRun, rng: random.Random) -> str:
    node = run.node(rng)
    if node is None:
        return "between two starts"
    absent = rng.uniform(0.1, 5)
    run.place.cluster.kill_slurmd(node)
    time.sleep(absent)
    run.place.cluster.start_slurmd(node)
    return f"started again after {absent:.1f} s"


def lose_slurmd(run: SlurmRun, rng: random.Random) -> str:
    """Its ranks live on while SLURM gives the node up, and the job to others."""
    return lose(run, rng, run.place.cluster.kill_slurmd)


def lose_node(run: SlurmRun, rng: random.Random) -> str:
    """Its daemon, steps and ranks are gone at once, as by a power cut."""
    return lose(run, rng, run.place.cluster.cut_power)


def lose(run: SlurmRun, rng: random.Random, end: Callable[[str], None]) -> str:
    node = run.node(rng)
    if node is None:
        return "between two starts"
    end(node)
    began = time.monotonic()
    down = until(lambda: "DOWN" in node_state(run.place, node), 240)
    run.place.cluster.start_slurmd(node)
    absent = time.monotonic() - began
    return f"started again after {absent:.0f} s" + (", its node being down" if down else "")


def node_state(place: Place, node: str) -> str:
    time.sleep(0.5)
    return place.call("sinfo", "-h", "-n", node, "-p", "batch", "-o", "%T").upper()


def kill_rank(run: SlurmRun, rng: random.Random) -> str:
    number = rng.randrange(NODES * RANKS_PER_NODE)
    rank = run.process("bigbatch.trainers.worker", SLURM_PROCID=number)
    if rank is None:
        return "between two starts"
    rank.kill()
    return f"rank {number}"


def kill_srun(run: SlurmRun, rng: random.Random) -> str:
    srun = run.process("--kill-on-bad-exit=1")
    if srun is None:
        return "between two starts"
    srun.kill()
    return "while it trains"


FAULTS: dict[str, Fault] = {
    "preemption": preempt,
    "kill slurmd": kill_slurmd,
    "lose slurmd": lose_slurmd,
    "lose node": lose_node,
    "kill rank under SLURM": kill_rank,
    "kill srun": kill_srun,
}
KINDS = [*FAULTS, *["preemption"] * 9]
QUICK = ("preemption", "kill slurmd", "kill rank under SLURM")


@contextmanager
def slurm_runs(folder: Path) -> Iterator[NewRun]:
    """Runs on a SLURM of four nodes that lives as long."""
    shard("digits", folder / "shards/digits", progress=False)
    # With SLURM's minutes of patience a run would end before its node is down.
    with slurm_cluster(folder / "slurm", patience_s=10) as cluster:
        place = Place(folder, cluster, SLURM_RECIPE)

        @contextmanager
        def new_run(name: str) -> Iterator[Run]:
            run = SlurmRun(place, name)
            try:
                yield run
            finally:
                run.stop()

        yield new_run


def machine() -> dict[str, Any]:
    version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True)
    return {
        "slurm": version.stdout.strip(),
        "ranks": NODES * RANKS_PER_NODE,
        "recipe": ["digits", *SLURM_RECIPE],
    }
