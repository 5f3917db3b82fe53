"""`bigbatch train` started by the real launchers: each process takes part as its rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.rundir import RunDir
from bigbatch.launcher.prove import relative_difference
from tests.helpers.ranks import free_port

BIN = Path(sys.executable).parent
MODULE = "bigbatch.launcher.cli"
CHANGES = ["duration=6 steps", "schedule.warmup=1 steps", "schedule.rewarmup=0 steps"]
CHANGES += ["global_batch=64", "micro_batch=16", "ensemble.soup=false"]
# accelerate and deepspeed meet at 29500 unless told another port: any other run's, too.
COMMANDS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", MODULE],
    "accelerate": [
        *("accelerate", "launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0", "-m", MODULE),
    ],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--module", MODULE],
}


def call(folder: str, *command: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    port = str(free_port())
    words = [port if word == "PORT" else str(word) for word in command]
    words[0] = str(BIN / words[0])
    return subprocess.run(
        words, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=900
    )


@pytest.fixture(scope="module")
def local(shards: str) -> RunDir:
    """The same training, started by `bigbatch train` alone."""
    done = call(shards, "bigbatch", "train", "digits", *CHANGES, "--nproc", 2, "--run", "local")
    assert done.returncode == 0, done.stderr
    return RunDir(Path(shards) / "runs/local")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", COMMANDS)
def test_a_launcher_gives_the_same_weights(launcher: str, shards: str, local: RunDir) -> None:
    done = call(shards, *COMMANDS[launcher], "train", "digits", *CHANGES, "--run-name", launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(local.path.with_name(launcher))
    assert json.loads(run.summary.read_text())["world_size"] == 2
    (start,) = [e for e in read_jsonl(run.events) if e["kind"] == "start"]
    assert (start["step"], start["world_size"]) == (0, 2)
    weights = "checkpoints/step-00000006/model.safetensors"
    assert relative_difference(run.path / weights, local.path / weights) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_bigbatch_starts_a_launcher_that_gives_the_same_weights(
    launcher: str, shards: str, local: RunDir
) -> None:
    options, name = ["--nproc", "2", "--launcher", launcher], f"{launcher}-2"
    done = call(shards, "bigbatch", "train", "digits", *CHANGES, *options, "--run", name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ranks 2, launcher {launcher}" in done.stderr
    run = RunDir(local.path.with_name(name))
    assert json.loads(run.summary.read_text())["world_size"] == 2
    weights = "checkpoints/step-00000006/model.safetensors"
    assert relative_difference(run.path / weights, local.path / weights) == 0.0


@pytest.mark.slow
def test_more_ranks_than_micro_batches_under_torchrun(shards: str) -> None:
    command = ["torchrun", "--standalone", "--nproc-per-node", "5", "-m", MODULE]
    done = call(shards, *command, "train", "digits", "--run-name", "five")
    assert done.returncode != 0
    assert done.stderr.count("bigbatch: 5 ranks, but a step has only 4 micro-batches") == 1
    assert not (Path(shards) / "runs/five").exists()


@pytest.mark.slow
def test_deepspeed_gives_no_name_to_a_run(shards: str) -> None:
    done = call(shards, *COMMANDS["deepspeed"], "train", "digits")
    assert done.returncode != 0
    assert "add --run-name NAME" in done.stderr


@pytest.mark.slow
def test_two_agents_that_meet_give_the_same_weights(shards: str, local: RunDir) -> None:
    # As on two machines: the same command on each, here both on this one.
    endpoint = f"localhost:{free_port()}"
    options = ["--nproc", "1", "--nnodes", "2", "--rdzv-endpoint", endpoint]
    command = [BIN / "bigbatch", "train", "digits", *CHANGES, *options, "--run", "nodes"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen(list(map(str, command)), cwd=shards, env=env) for _ in range(2)]
    assert [agent.wait(900) for agent in agents] == [0, 0]
    run = RunDir(local.path.with_name("nodes"))
    assert json.loads(run.summary.read_text())["world_size"] == 2
    weights = "checkpoints/step-00000006/model.safetensors"
    assert relative_difference(run.path / weights, local.path / weights) == 0.0
