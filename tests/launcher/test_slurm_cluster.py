"""Runs on a real SLURM of four nodes on this machine; skipped with a reason elsewhere."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bigbatch.configs.rundir import RunDir, read_jsonl
from bigbatch.launcher.prove import relative_difference
from tests.slurm_cluster import missing, slurm_cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(missing() is not None, reason=f"SLURM: {missing()}"),
]
BIGBATCH = Path(sys.executable).parent / "bigbatch"
TEMPLATE = Path(__file__).parents[2] / "slurm" / "train.sbatch"
STEPS = 60
WAITING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "PREEMPTED", "REQUEUED")
CHANGES = [f"duration={STEPS} steps", "evaluate.every=20 steps", "checkpoint.every=1000 steps"]


@dataclass
class Place:
    """A folder with the digits' shards, on a cluster, and a local run with four ranks."""

    folder: Path
    env: dict[str, str]

    def call(self, *command: object, status: int = 0) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def submit(self, name: str, *options: str) -> str:
        command = [BIGBATCH, "submit", "digits", *CHANGES, "--run", name, "--json", *options]
        return str(json.loads(self.call(*command, "--cpus-per-rank", "1"))["job"])

    def state(self, job: str) -> str:
        """The job's state and exit status, such as COMPLETED 0:0."""
        words = self.call("scontrol", "show", "job", "-o", job).split()
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        return f"{fields['JobState']} {fields['ExitCode']}"

    def wait(self, job: str, state: str, limit_s: float = 240) -> None:
        deadline = time.monotonic() + limit_s
        while (now := self.state(job)) != state:
            assert now.split()[0] in WAITING, f"{now}, not {state}"
            assert time.monotonic() < deadline, f"{now}, not {state}"
            time.sleep(0.5)

    def run(self, name: str) -> RunDir:
        return RunDir(self.folder / "runs" / name)


@pytest.fixture(scope="module")
def place(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    (folder / "shards").symlink_to(Path(shards) / "shards")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        env = {**cluster, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        env["PATH"] = f"{BIGBATCH.parent}:{env['PATH']}"
        here = Place(folder, env)
        here.call(BIGBATCH, "train", "digits", *CHANGES, "--run", "local", "--nproc", "4")
        yield here


def assert_same_weights(run: RunDir, reference: RunDir) -> None:
    """Bit for bit: the last checkpoint's weights and optimizer state."""
    name = f"step-{STEPS:08d}"
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = run.checkpoints / name / file, reference.checkpoints / name / file
        assert relative_difference(ours, theirs) == 0.0


def assert_every_step_once(run: RunDir) -> None:
    steps = [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))


def test_two_nodes_give_the_weights_of_this_machine(place: Place) -> None:
    job = place.submit("two-nodes", "--nodes", "2", "--ranks-per-node", "2")
    place.wait(job, "COMPLETED 0:0")
    run, local = place.run("two-nodes"), place.run("local")
    assert_same_weights(run, local)
    ours, theirs = (json.loads(r.summary.read_text()) for r in (run, local))
    assert ours["world_size"] == 4
    assert (ours["val"], ours["test"]) == (theirs["val"], theirs["test"])
    assert "finished" in place.call(BIGBATCH, "runs")


def test_preempted_and_requeued(place: Place) -> None:
    job = place.submit("preempted", "--nodes", "2", "--ranks-per-node", "2")
    run = place.run("preempted")
    while not any(r["step"] >= 5 for r in read_jsonl(run.metrics)):
        assert place.state(job).split()[0] in WAITING
        time.sleep(0.1)
    urgent = [*("sbatch", "--parsable", "-p", "urgent", "-N", "4", "--exclusive"), "--wrap=true"]
    place.wait(place.call(*urgent, "--output=/dev/null").strip(), "COMPLETED 0:0")
    place.wait(job, "COMPLETED 0:0")
    events = read_jsonl(run.events)
    (stopped,) = [e["step"] for e in events if e["kind"] == "signal"]
    assert [e["step"] for e in events if e["kind"] == "start"] == [0, stopped]
    assert 5 <= stopped < STEPS
    assert_same_weights(run, place.run("local"))
    assert_every_step_once(run)
    # One output file over both starts.
    assert len(list(run.path.glob("slurm-*.out"))) == 1


def test_the_template_by_hand_on_another_number_of_ranks(place: Place) -> None:
    options = ["--nodes=3", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    output = place.folder / "by-hand.txt"
    job = place.call(
        *("sbatch", "--parsable", f"--output={output}", *options, TEMPLATE, "digits", *CHANGES)
    ).strip()
    place.wait(job, "COMPLETED 0:0")
    run = place.run(f"digits-{job}")
    assert json.loads(run.summary.read_text())["world_size"] == 3
    assert_same_weights(run, place.run("local"))  # reduction: exact


def test_an_end_by_the_users_error_is_not_requeued(place: Place) -> None:
    job = place.submit("broken", "--nodes", "1", "--ranks-per-node", "2", "--sbatch-arg=--hold")
    moved = place.folder / "moved"
    (place.folder / "shards").rename(moved)
    try:
        place.call("scontrol", "release", job)
        place.wait(job, "FAILED 2:0")
    finally:
        moved.rename(place.folder / "shards")
    (output,) = place.run("broken").path.glob("slurm-*.out")
    assert output.read_text().count("data.path shards/digits is no folder here") == 1
    assert "Traceback" not in output.read_text()


def test_a_refused_job(place: Place) -> None:
    command = [BIGBATCH, "submit", "digits", "--run", "refused", "--partition", "nowhere"]
    done = subprocess.run(
        list(map(str, command)),
        cwd=place.folder,
        env=place.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "sbatch refused the job" in done.stderr
    assert not place.run("refused").path.exists()
    assert os.listdir(place.folder / "runs")
