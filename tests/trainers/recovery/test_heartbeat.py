"""The lock on a run, and who is missing when a step hangs."""

import json
import subprocess
import sys
import threading
import time

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.trainers.recovery import heartbeat as heartbeat_module
from bigbatch.trainers.recovery.heartbeat import Heartbeat, heartbeat_path, read_heartbeat
from bigbatch.trainers.recovery.watchdog import DOING, find_missing

HOLDER = """
import sys, time
from pathlib import Path
from bigbatch.trainers.recovery import heartbeat as heartbeat_module
from bigbatch.trainers.recovery.heartbeat import Heartbeat
heartbeat = Heartbeat(Path(sys.argv[1]), 0)
heartbeat.record.update(host=sys.argv[2]) if sys.argv[2:] else None
heartbeat.lock()
print("mine", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "heartbeats"


def test_a_run_has_one_holder_until_it_dies(folder):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "mine\n"
        mine = Heartbeat(folder, 0)
        with pytest.raises(UserError, match=f"run is in use by process {holder.pid} on "):
            mine.lock()
        mine.close()  # leaves the holder's record as it is
        assert read_heartbeat(folder, 0)["pid"] == holder.pid
        holder.kill()
    successor = Heartbeat(folder, 0)
    successor.lock()
    assert read_heartbeat(folder, 0)["pid"] == successor.record["pid"]


def test_the_lock_of_a_machine_that_is_gone_is_waited_for(folder, monkeypatch):
    monkeypatch.setattr(heartbeat_module, "_DYING_S", 0.0)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), "elsewhere"], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "mine\n"
        threading.Timer(1.0, holder.kill).start()
        heartbeat = Heartbeat(folder, 0)
        heartbeat.lock(silence_s=0.2)
        assert holder.wait(10) != 0
    assert read_heartbeat(folder, 0)["host"] == heartbeat.record["host"]


def foreign(folder, **fields):
    """A heartbeat that another machine left, whose lock does not reach this one."""
    folder.mkdir()
    record = {"rank": 0, "host": "elsewhere", "pid": 1, "job": None, "since": "x", "beat": 5}
    heartbeat_path(folder, 0).write_text(json.dumps({**record, **fields}))


def test_a_dead_machines_run_is_taken_over(folder):
    foreign(folder)
    heartbeat = Heartbeat(folder, 0)
    heartbeat.lock(silence_s=0.2)
    assert read_heartbeat(folder, 0)["host"] == heartbeat.record["host"]


def test_a_heartbeat_from_another_machine_that_goes_on_is_a_holder(folder):
    foreign(folder, job="77")

    def beat():
        time.sleep(0.3)
        heartbeat_path(folder, 0).write_text(json.dumps({"host": "elsewhere", "beat": 6}))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="on elsewhere"):
        Heartbeat(folder, 0).lock(silence_s=60)
    thread.join()


def test_a_requeued_job_does_not_wait_for_itself(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    foreign(folder, job="77")
    started = threading.Event()
    heartbeat = Heartbeat(folder, 0)
    monkeypatch.setattr(time, "sleep", lambda seconds: started.set())
    heartbeat.lock(silence_s=600)
    assert not started.is_set()


def test_a_run_of_an_array_is_named_by_its_task(folder, monkeypatch):
    """Its job id may be the array's own number, by which scancel would end all runs."""
    for name, value in (("JOB_ID", "7"), ("ARRAY_JOB_ID", "7"), ("ARRAY_TASK_ID", "2")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    heartbeat = Heartbeat(folder, 0)
    heartbeat.lock()
    said = str(heartbeat._refusal(read_heartbeat(folder, 0)))
    assert ", job 7_2, since" in said


def test_a_run_that_ended_leaves_no_holder(folder):
    heartbeat = Heartbeat(folder, 0)
    heartbeat.lock()
    heartbeat.close()
    assert read_heartbeat(folder, 0) == {}


def test_beats_keep_the_files_size(folder):
    heartbeat = Heartbeat(folder, 3)
    for step in (9, 10**9, 7):
        heartbeat.write(step=step)
        assert heartbeat_path(folder, 3).stat().st_size == 512
        assert read_heartbeat(folder, 3)["step"] == step


def record(step, doing, beat=1, attempt="a"):
    return {"step": step, "doing": doing, "beat": beat, "attempt": attempt}


@pytest.mark.parametrize(
    ("ranks", "missing"),
    [
        ({0: record(4, "reducing"), 1: record(4, "reducing")}, []),
        ({0: record(4, "reducing"), 1: record(4, "loading")}, [1]),
        ({0: record(4, "computing"), 1: record(5, "evaluating")}, [0]),
        ({0: record(5, "evaluating"), 1: record(5, "loading"), 2: record(5, "reducing")}, [0, 1]),
        ({0: record(4, "reducing"), 1: record(4, "reducing", attempt="earlier")}, [1]),
        ({0: record(4, "reducing"), 1: {}}, [1]),
    ],
)
def test_who_is_behind_is_missing(ranks, missing):
    before = {r: {**h, "beat": 0} for r, h in ranks.items() if r != 0}
    assert find_missing(before, ranks, "a") == missing


def test_a_heartbeat_that_stands_still_is_missing_even_if_it_was_ahead():
    ranks = {0: record(4, "reducing"), 1: record(4, "reducing"), 2: record(9, "loading")}
    assert find_missing({1: {"beat": 0}, 2: {"beat": 1}}, ranks, "a") == [2]


def test_the_order_of_a_step():
    assert DOING.index("saving") < DOING.index("loading") < DOING.index("reducing")
