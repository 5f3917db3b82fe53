"""A run that goes on with other ranks, another launcher, or without a machine that is lost."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.start import agent_command, worker_command
from tests.helpers import warm
from tests.helpers.ranks import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # five starts one after another
STEPS = 16
SMALL = ("global_batch=64", "micro_batch=16", "data.workers=0", "checkpoint.every=4 steps")
# Machines that may come later are waited for, which is nothing that these tests test; but on a busy
# machine the second one needs some seconds to come at all.
AGENT = """
from bigbatch.trainers import agent
agent._LAST_CALL_S = 15
agent.leave(agent.main())
"""


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "digits").symlink_to(digits)
    return folder


def new_run(folder: Path, name: str) -> RunDir:
    changes = [f"data.path={folder / 'digits'}", "log.wandb=off", "log.trace=true"]
    return create_run(folder / name, load_recipe("digits", [*changes, *SMALL]))


def start(command: list[str]) -> None:
    done = warm.run(command, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr


def samples(run: RunDir) -> dict[tuple[int, int], list[int]]:
    """The samples of each micro-batch, by step and its number in the step."""
    records = [r for path in run.trace.iterdir() for r in read_jsonl(path)]
    return {(r["step"], r["micro"]): r["samples"] for r in records if r["step"] < STEPS}


def files(run: RunDir) -> dict[str, dict[str, str]]:
    manifest = run.checkpoints / f"step-{STEPS:08d}" / "manifest.json"
    found: dict[str, dict[str, str]] = json.loads(manifest.read_text())["files"]
    return {name: found[name] for name in ("model.safetensors", "optimizer.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunDir:
    run = new_run(folder, "undisturbed")
    start(agent_command(run.path, 2, stop_at=STEPS))
    return run


def same(run: RunDir, undisturbed: RunDir) -> None:
    assert samples(run) == samples(undisturbed)
    assert files(run) == files(undisturbed)
    steps = [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))


def test_other_world_sizes_and_another_launcher(folder: Path, undisturbed: RunDir) -> None:
    run = new_run(folder, "sizes")
    start(agent_command(run.path, 4, stop_at=4))
    start(agent_command(run.path, 3, stop_at=7))
    start(agent_command(run.path, 1, stop_at=10))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    worker = worker_command(run.path, 13)
    start([*torchrun, "--standalone", *worker[worker.index("-m") :]])
    start(agent_command(run.path, 4, stop_at=STEPS))
    same(run, undisturbed)
    worlds = [e["world_size"] for e in read_jsonl(run.events) if e["kind"] == "start"]
    assert worlds == [4, 3, 1, 2, 4]


def test_a_lost_machine_leaves_the_others_training(folder: Path, undisturbed: RunDir) -> None:
    run = new_run(folder, "nodes")
    program = folder / "agent.py"
    program.write_text(AGENT)
    machines = ["--nproc", "1", "--nnodes", "1:2", "--rdzv-endpoint", f"localhost:{free_port()}"]
    command = warm.script(program, *machines, "--stop-at", STEPS, run.path)
    output = folder / "nodes.txt"
    with output.open("w") as file:
        agents = []
        for _ in range(2):  # the first one keeps the meeting place
            agents.append(warm.popen(command, stdout=file, stderr=file))
            time.sleep(1)
    try:
        while not any(r["step"] >= 5 for r in read_jsonl(run.metrics)):
            assert agents[0].poll() is None, output.read_text()
            time.sleep(0.05)
        agents[1].send_signal(signal.SIGKILL)
        assert agents[0].wait(280) == 0, output.read_text()
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    same(run, undisturbed)
    worlds = [e["world_size"] for e in read_jsonl(run.events) if e["kind"] == "start"]
    assert worlds == [2, 1]
