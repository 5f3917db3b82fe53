"""Runs as their directories describe them."""

import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from bigbatch.configs import rundir
from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.cli.main import cli
from bigbatch.launcher.cli.render import runs_table, status_table
from bigbatch.launcher.runs import registry
from bigbatch.launcher.runs.processes import processes
from bigbatch.launcher.runs.registry import describe, find_run, list_runs, status


def make(runs: Path, name: str, events: list[dict[str, object]], metrics: str = "") -> RunDir:
    run = create_run(runs / name, load_recipe("digits"))
    run.events.write_text("".join(json.dumps(e) + "\n" for e in events))
    run.metrics.write_text(metrics)
    return run


START = {"kind": "start", "step": 0, "total_steps": 20, "world_size": 2, "device": "cpu"}
METRICS = (
    '{"kind": "train", "step": 1, "loss": 2.3, "step_s": 0.5}\n'
    '{"kind": "eval", "step": 1, "split": "val", "accuracy": 0.5}\n'
    '{"kind": "train", "step": 2, "loss": 2.0, "lr": 0.1, "images_per_s": 512, "step_s": 0.5}\n'
    '{"kind": "eval", "step": 2, "split": "val", "accuracy": 0.25}\n'
    '{"kind": "eval", "step": 2, "split": "test", "accuracy": 0.9}\n'
)


def test_what_one_run_says(tmp_path: Path) -> None:
    run = make(tmp_path, "a", [START], METRICS)
    info = describe(run)
    assert (info.name, info.step, info.total_steps, info.best_accuracy) == ("a", 2, 20, 0.5)
    values = status(run)
    assert (values["loss"], values["world_size"], values["starts"]) == (2.0, 2, 1)
    assert values["seconds_left"] == pytest.approx(18 * 0.5)
    json.dumps(values, allow_nan=False)


def test_the_best_of_an_error_is_the_least(tmp_path: Path) -> None:
    lines = METRICS.replace("0.5}", "3.5}").replace("0.25}", "2.5}").replace("accuracy", "mae")
    run = make(tmp_path, "a", [START], lines)
    info = describe(run)
    assert (info.best_accuracy, info.best_score) == (None, {"mae": 2.5})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(runs_table([info]))
    assert "MAE 2.5 " in console.export_text()


def test_time_left_goes_by_images_where_the_batch_changes(tmp_path: Path) -> None:
    start = START | {"samples": 0, "total_samples": 1000}
    steps = [{"step": 1, "global_batch": 50, "samples": 50, "step_s": 0.5}]
    steps += [{"step": 2, "global_batch": 150, "samples": 200, "step_s": 1.5}]
    lines = "".join(json.dumps({"kind": "train", **step}) + "\n" for step in steps)
    values = status(make(tmp_path, "a", [start], lines))
    assert values["seconds_left"] == pytest.approx(800 * (2.0 / 200))


def test_status_shows_alerts_and_the_slowest_rank(tmp_path: Path) -> None:
    slowest = {"rank": 1, "phase": "data", "share": 0.2}
    record = {"kind": "train", "step": 3, "loss": 1.0, "slowest": slowest, "mfu": 0.41}
    spike = {"kind": "spike", "step": 3, "loss": 9.0}
    events = [START, spike, {"kind": "checkpoint", "step": 3}]
    values = status(make(tmp_path, "a", events, METRICS + json.dumps(record) + "\n"))
    assert [(e["kind"], e["step"]) for e in values["alerts"]] == [("spike", 3)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(status_table(values))
    text = console.export_text()
    for shown in ("spike at step 3", "rank 1 in data", "41.0%"):
        assert shown in text


@pytest.mark.parametrize(
    ("last", "state"),
    [
        (None, "new"),
        ({"kind": "end", "state": "finished"}, "finished"),
        ({"kind": "end", "state": "failed"}, "failed"),
        ({"kind": "signal", "step": 1}, "running"),
    ],
)
def test_states(tmp_path: Path, last: dict[str, object] | None, state: str) -> None:
    assert describe(make(tmp_path, "a", [START, last] if last else [])).state == state


def test_a_process_on_this_machine_is_asked_whether_it_lives(tmp_path: Path) -> None:
    here = {**START, "host": socket.gethostname(), "pid": os.getpid()}
    run = make(tmp_path, "a", [here])
    with trains("worker", run.path) as process:
        assert describe(run).state == "running"
        process.kill()
        process.wait()
        assert describe(run).state == "killed"
        # The number may belong to another program by now.
        assert describe(make(tmp_path, "b", [here])).state == "killed"


def test_another_users_process_is_that_of_their_own_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose folder may not be looked into; names such as `digits` are everybody's."""
    run = make(tmp_path, "a", [{**START, "host": socket.gethostname(), "pid": 1}])

    def refuse(path: Path, other: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "samefile", refuse)
    with trains("worker", "runs/a"):
        assert describe(run).state == "running"  # the run is that user's
        os.chown(run.path, os.getuid() + 1, -1) if os.getuid() == 0 else pytest.skip("needs root")
        assert describe(run).state == "killed"


@contextmanager
def trains(
    module: str, path: Path | str, body: str = "pass", launcher: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs `body`, and whose command line is that of one that trains `path`."""
    program = f"import time; {body}; print(flush=True); time.sleep(60)"
    words = [*launcher, "-m", f"bigbatch.trainers.{module}", str(path)]
    command = [sys.executable, "-c", program, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # its command line is there
        try:
            yield process
        finally:
            process.kill()


def test_a_process_belongs_to_the_directory_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy has the records of the original, and their process numbers."""
    monkeypatch.chdir(tmp_path)
    stopped = {"kind": "end", "state": "stopped"}
    run = make(tmp_path, "a", [{**START, "host": socket.gethostname(), "pid": 1}])
    resumed = make(tmp_path, "b", [START, stopped])
    (tmp_path / "link").symlink_to(run.path)
    (tmp_path / "elsewhere").mkdir()
    with trains("worker", "link") as process, trains("worker", resumed.path):
        copy = RunDir(shutil.copytree(run.path, tmp_path / "copy"))
        other = RunDir(shutil.copytree(run.path, tmp_path / "elsewhere" / "link"))
        names = (run, RunDir(tmp_path / "link"), resumed)
        assert [describe(r).state for r in names] == ["running"] * 3  # a resume notes itself late
        assert [describe(r).state for r in (copy, other)] == ["killed"] * 2
        assert {i.name: i.state for i in list_runs(tmp_path)} == {
            "a": "running",
            "b": "running",
            "link": "running",
            "copy": "killed",
        }
        with pytest.raises(UserError, match="nothing to cancel"):
            registry.cancel(copy)
        assert process.poll() is None
        assert f"process {process.pid} finishes" in registry.cancel(run)
        assert process.wait() == -signal.SIGTERM


def test_a_trunk_is_stopped_and_kept_where_its_workers_train(tmp_path: Path) -> None:
    phases = "phases={name: swap, workers: 2, duration: 1 epochs, global_batch: 64}"
    trunk = create_run(tmp_path / "t", load_recipe("digits", [phases]))
    trunk.events.write_text(json.dumps(START) + '\n{"kind": "end", "state": "stopped"}\n')
    worker = make(tmp_path, "t-worker-1", [START])
    with trains("agent", worker.path) as process:
        with pytest.raises(UserError, match=r"t is running; `bigbatch cancel .*t` ends it first"):
            registry.remove(trunk)
        assert registry.cancel(trunk) == (
            f"t-worker-1: process {process.pid} finishes its step, saves and ends"
        )
        assert process.wait() == -signal.SIGTERM
    with pytest.raises(UserError, match="t is stopped: there is nothing to cancel"):
        registry.cancel(trunk)
    registry.remove(trunk)


def test_a_launcher_is_not_taken_for_a_rank(tmp_path: Path) -> None:
    """accelerate's ends its ranks at a signal, without letting them save."""
    run = make(tmp_path, "a", [])
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    with trains("worker", run.path, launcher=launcher):
        assert processes(run) == []
        with trains("worker", run.path) as rank, trains("agent", run.path) as agent:
            assert processes(run) == [agent.pid, rank.pid]


def test_a_run_that_starts_or_resumes_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigbatch.trainers.recovery.heartbeat._DYING_S", 0.2)
    run = make(tmp_path, "a", [START, {"kind": "end", "state": "stopped"}])
    new = make(tmp_path, "new", [])
    with trains("worker", run.path), trains("agent", new.path):
        for each in (run, new):
            with pytest.raises(UserError, match="is running; `bigbatch cancel"):
                registry.remove(each)
    # A lock is enough: its holder may be on another machine, or in another container.
    holder = (
        "from pathlib import Path; from bigbatch.trainers.recovery.heartbeat import Heartbeat; "
        f"hold = Heartbeat(Path({str(run.heartbeats)!r}), 0); hold.lock()"
    )
    with trains("holder", run.path, holder) as process:
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on"):
            registry.remove(run)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "new"]
        assert run.recipe_file.exists()
        process.kill()
        process.wait()
    registry.remove(run)
    registry.remove(new)
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_job_may_still_wait_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of a preempted run say no more than that it stopped."""
    events = [{"kind": "submitted", "job": "7"}, START, {"kind": "end", "state": "stopped"}]
    run = make(tmp_path / "runs", "a", events)
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    waits = "echo '7|PENDING|'"
    for body, error in (("exit 1", "does not answer whether job 7"), (waits, "queued")):
        squeue.write_text(f"#!/bin/sh\n{body}\n")
        squeue.chmod(0o755)
        with pytest.raises(UserError, match=error):
            registry.remove(run)
    squeue.write_text("#!/bin/sh\necho 'Invalid job id specified' >&2; exit 1\n")
    registry.remove(run)
    assert not run.path.exists()


def test_a_link_to_a_run_goes_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").mkdir()
    run = make(tmp_path / "disk", "a", [])
    link = RunDir(tmp_path / "runs" / "best")
    link.path.symlink_to(run.path)
    monkeypatch.setattr(Path, "unlink", lambda path: (_ for _ in ()).throw(PermissionError(13, "")))
    with pytest.raises(UserError, match="cannot remove"):
        registry.remove(link)
    assert run.recipe_file.exists()  # both, or none of them
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["rm", "best"], input="y\n")
    assert f"remove runs/best, a link to {run.path}, at step 0" in done.output
    assert f"removed runs/best, a link to {run.path}\n" in done.output
    assert [list((tmp_path / name).iterdir()) for name in ("disk", "runs")] == [[], []]
    monkeypatch.chdir(make(tmp_path, "here", []).path)
    registry.remove(RunDir(Path()))
    assert not (tmp_path / "here").exists()


def test_a_full_disk_keeps_no_run_from_being_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, "a", [])

    def full(folder: Path, rank: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(registry, "Heartbeat", full)
    registry.remove(run)
    assert list(tmp_path.iterdir()) == []


def test_between_a_crash_and_the_agents_restart_a_run_runs(tmp_path: Path) -> None:
    start = {**START, "host": socket.gethostname(), "pid": os.getpid()}
    failed = {"kind": "end", "state": "failed"}
    killed, crashed = make(tmp_path, "a", [start]), make(tmp_path, "b", [start, failed])
    done = make(tmp_path, "c", [start, {"kind": "end", "state": "finished"}])
    paths = [run.path for run in (killed, crashed, done)]
    with trains("agent", paths[0]) as first, trains("agent", paths[1]), trains("agent", paths[2]):
        assert [describe(run).state for run in (killed, crashed, done)] == [
            *("running", "running", "finished")
        ]
        assert not registry.has_ended(crashed)
        assert "finishes its step" in registry.cancel(crashed)
        first.kill()
        first.wait()
        while processes(crashed):
            time.sleep(0.01)
        assert [describe(run).state for run in (killed, crashed)] == ["killed", "failed"]
        assert registry.has_ended(crashed)


def test_a_silent_run_on_another_machine_counts_as_killed(tmp_path: Path) -> None:
    run = make(tmp_path, "a", [{**START, "host": "elsewhere", "pid": 1}])
    assert describe(run).state == "running"
    assert describe(run, now=time.time() + 3600).state == "killed"


def test_the_newest_run_comes_first_and_damage_is_listed(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "old", "older"]):
        run = make(tmp_path, name, [START])
        for path in (run.recipe_file, run.events, run.metrics):
            os.utime(path, (time.time() - 100 * age,) * 2)
    damaged = {"kind": "start", "total_steps": "many"}
    (tmp_path / "old" / "events.jsonl").write_text(json.dumps(damaged) + "\n")
    (tmp_path / "no-run").mkdir()
    found = list_runs(tmp_path)
    assert {i.name: i.state for i in found}["old"] == "unreadable"
    assert [i.name for i in found if i.name != "old"] == ["new", "older"]
    assert list_runs(tmp_path / "nothing") == []


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    run = make(tmp_path, "a", [START], METRICS + '{"kind": "eval", "split": "val", "acc\n')
    info = describe(run)
    assert (info.step, info.best_accuracy, info.state) == (2, 0.5, "running")


def test_json_that_is_nested_too_deeply_is_a_torn_line(tmp_path: Path) -> None:
    run = make(tmp_path, "a", [START], METRICS + "[" * 100_000 + "\n")
    run.summary.write_text("[" * 100_000)
    assert (describe(run).step, registry.read_json(run.summary)) == (2, None)


def test_runs_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    run = make(tmp_path, "a", [])
    assert find_run("a", tmp_path).path == run.path
    assert find_run(str(run.path), tmp_path / "other").path == run.path
    with pytest.raises(UserError, match="bigbatch runs"):
        find_run("b", tmp_path)


def test_a_run_that_may_not_be_read_or_signalled_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Raised by hand: root, as whom tests may run, is refused nothing.
    def refuse(*args: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    here = {**START, "host": socket.gethostname(), "pid": os.getpid()}
    run = make(tmp_path, "a", [here], METRICS)
    monkeypatch.setattr(registry, "processes", lambda run, trainers=None: [os.getpid()])
    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(UserError, match="cannot signal process"):
        registry.cancel(run)
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(UserError, match="may not be read"):
        find_run("a", tmp_path)


def test_a_full_disk_leaves_no_half_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir, "write_atomically", full)
    with pytest.raises(UserError, match="No space left"):
        create_run(tmp_path / "a", load_recipe("digits"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.EBUSY, "Device or resource busy"), KeyboardInterrupt()]
)
def test_what_a_removal_leaves_behind_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    run = make(tmp_path, "a", [])

    def refuse(path: Path) -> None:
        raise error

    monkeypatch.setattr(registry.shutil, "rmtree", refuse)
    with pytest.raises(UserError, match=r"removed in part .*rm -r ") as said:
        registry.remove(run)
    (left,) = tmp_path.iterdir()
    assert f"`rm -r {left}`" in str(said.value)


@pytest.mark.parametrize(
    "record",
    [
        b"[" * 100_000,
        b'{"kind": "start", "total_steps": 1e999}',
        b'{"kind": "start", "total_steps": [], "host": {}}',
        b'{"kind": "submitted", "job": {"a": 1e999}}',
        b'{"kind": "end", "state": []}',
        b'{"kind": "start", "total_steps": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_one_run_holds_hides_no_other_and_can_be_removed(
    tmp_path: Path, record: bytes
) -> None:
    make(tmp_path, "well", [START], METRICS)
    odd = make(tmp_path, "odd", [])
    for path in (odd.events, odd.metrics, odd.manifest, odd.summary):
        path.write_bytes(record + b"\n")
    listed = CliRunner().invoke(cli, ["runs", "--runs", str(tmp_path), "--json"])
    assert {info["name"] for info in json.loads(listed.output)} == {"well", "odd"}
    shown = CliRunner().invoke(cli, ["runs", "--runs", str(tmp_path)])
    assert (shown.exit_code, shown.exception) == (0, None)
    removed = CliRunner().invoke(cli, ["rm", "odd", "--yes", "--runs", str(tmp_path)])
    assert removed.exit_code == 0, removed.output


def test_what_is_asked_of_a_long_run_does_not_grow_with_its_files(tmp_path: Path) -> None:
    """200 MB of events took `runs` 17 s and 1.6 GB."""
    trouble = {"kind": "disk", "step": 1, "error": "x" * 1000}
    run = make(tmp_path, "a", [{**START, "job": None}, *[trouble] * 9_000], METRICS * 5_000)
    tracemalloc.start()
    try:
        info, values = describe(run), status(run)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert (info.step, info.total_steps, info.best_accuracy) == (2, 20, 0.5)
    assert (values["starts"], len(values["alerts"])) == (1, 5)
