"""Forked ranks compute what ranks started from nothing compute, bit for bit."""

import os
import subprocess
from pathlib import Path

import pytest

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.start import agent_command, worker_command
from tests.helpers import warm
from tests.helpers.ranks import free_port

STEPS = 3


def start_from_nothing(run: RunDir, world: int) -> None:
    """As torchrun, accelerate and srun do."""
    env = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(free_port())
    ranks = [
        subprocess.Popen(
            worker_command(run.path, STEPS), env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(world)
    ]
    assert [rank.wait(280) for rank in ranks] == [0] * world


@pytest.mark.slow
def test_two_ranks_forked_and_not(digits: Path, tmp_path: Path) -> None:
    changes = ["data.image_size=16", "global_batch=128", "micro_batch=32", "duration=20 steps"]
    changes += ["reduction=overlapped", "schedule={name: constant}", "log.wandb=off"]
    recipe = load_recipe("digits", [f"data.path={digits}", *changes])
    cold, forked = (create_run(tmp_path / name, recipe) for name in ("cold", "forked"))
    start_from_nothing(cold, 2)
    done = warm.run(agent_command(forked.path, 2, stop_at=STEPS), capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "from nothing" not in done.stderr
    weights, optimizer = (
        [
            (run.checkpoints / f"step-{STEPS:08d}" / f"{name}.safetensors").read_bytes()
            for run in (cold, forked)
        ]
        for name in ("model", "optimizer")
    )
    assert weights[0] == weights[1]
    assert optimizer[0] == optimizer[1]
    starts = [next(e for e in read_jsonl(r.events) if e["kind"] == "start") for r in (cold, forked)]
    for same in ("threads", "cpu_capability", "environment", "device"):
        assert starts[0][same] == starts[1][same]
