"""The watchdog in a process of its own: it ends what hangs, and nothing else."""

import subprocess
import sys

import pytest

from bigbatch.configs.rundir import RunDir, read_jsonl
from bigbatch.trainers.recovery.signals import SAVED

SCRIPT = """
import sys, time
from pathlib import Path
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.recovery.heartbeat import Heartbeat
from bigbatch.trainers.recovery.watchdog import Watchdog

run = RunDir(Path(sys.argv[1]))
with Watchdog(run, Heartbeat(run.heartbeats, 0), 1, "a", stall_s=0.4) as watchdog:
    for step in range(2):
        watchdog.beat(step, "loading")
        watchdog.beat(step, "reducing")
    {body}
print("went on")
"""


def watched(path, body):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{body}", body), str(path)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_step_that_hangs_is_told_and_ended(tmp_path):
    done = watched(tmp_path, "watchdog.beat(2, 'loading'); time.sleep(60)")
    assert done.returncode == SAVED, done.stderr
    assert "step 3 hangs for " in done.stderr
    assert "no rank, all wait for each other" in done.stderr
    run = RunDir(tmp_path)
    (event,) = read_jsonl(run.events)
    assert (event["kind"], event["step"], event["doing"]) == ("stall", 2, "loading")
    stacks = (run.stacks / "rank-00000.txt").read_text()
    assert 'File "<string>"' in stacks


@pytest.mark.parametrize("doing", ["evaluating", "saving"])
def test_what_takes_long_by_nature_may(tmp_path, doing):
    done = watched(tmp_path, f"watchdog.beat(2, '{doing}'); time.sleep(1.5)")
    assert done.stdout == "went on\n"
    assert not list(RunDir(tmp_path).stacks.iterdir())


def test_long_steps_make_it_patient(tmp_path):
    body = "watchdog._longest = 1.0; watchdog.beat(2, 'loading'); time.sleep(1.5)"
    assert watched(tmp_path, body).stdout == "went on\n"
