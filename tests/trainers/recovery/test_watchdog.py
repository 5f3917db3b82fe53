"""The watchdog in a process of its own: it ends what hangs, and nothing else."""

import subprocess
import sys

import pytest

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.trainers.recovery.heartbeat import Heartbeat
from bigbatch.trainers.recovery.signals import SAVED
from bigbatch.trainers.recovery.stored import list_checkpoints
from bigbatch.trainers.recovery.watchdog import Watchdog

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


def test_its_thread_never_sees_a_new_place_with_an_old_time(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    run = RunDir(tmp_path)
    watchdog = Watchdog(run, Heartbeat(run.heartbeats, 0), 1, "a", stall_s=300)

    class Watched(Watchdog):  # looked at after every change, as its thread might
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            assert now - self._moved <= self.limit()

    watchdog.__class__ = Watched
    for doing in ("loading", "reducing", "evaluating", "loading", "reducing", "loading"):
        now += 2900 if doing in ("loading", "evaluating") and watchdog._longest == 0 else 200
        watchdog.beat(1, doing)


def test_long_steps_make_it_patient(tmp_path):
    body = "watchdog._longest = 1.0; watchdog.beat(2, 'loading'); time.sleep(1.5)"
    assert watched(tmp_path, body).stdout == "went on\n"


SLOW_DISK = """
import sys, time
from bigbatch.configs.errors import UserError
from bigbatch.trainers import loop, worker
from bigbatch.trainers.recovery import saving

def write(*arguments, original=saving.write):
    time.sleep(8)
    return original(*arguments)

def check_step(recovery, step, *values, original=loop.check_step, **more):
    if step == 5:
        raise UserError("a step that went wrong")
    return original(recovery, step, *values, **more)

saving.write, loop.check_step = write, check_step
sys.exit(worker.main([sys.argv[1]]))
"""


@pytest.mark.slow
def test_an_error_that_waits_for_a_slow_disk_is_no_hang(digits, tmp_path):
    changes = ["global_batch=8", "micro_batch=8", "duration=9 steps", "schedule={name: constant}"]
    changes += [f"data.path={digits}", "data.workers=0", "log.wandb=off"]
    changes += ["checkpoint.every=4 steps", "recovery.stall_s=0.5"]
    run = create_run(tmp_path / "run", load_recipe("digits", changes))
    done = subprocess.run(
        [sys.executable, "-c", SLOW_DISK, run.path],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "a step that went wrong" in done.stderr
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-00000004"]
