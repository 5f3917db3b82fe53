"""The agent with real ranks: exit statuses, signals, and nobody left behind."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.launcher.runs.registry import describe
from bigbatch.launcher.start import agent_command
from bigbatch.trainers.agent import FORWARD, Agent, explain
from bigbatch.trainers.recovery.signals import CAUGHT, SAVED
from bigbatch.trainers.warm.parent import SERVER, Process
from tests.helpers import warm
from tests.helpers.ranks import free_port


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> RunDir:
    changes = [f"data.path={digits}", "log.wandb=off", "checkpoint.every=1000 steps"]
    changes += ["global_batch=64", "micro_batch=16", "data.workers=0"]
    return create_run(tmp_path / "a", load_recipe("digits", changes))


@contextmanager
def agent(run: RunDir, stop_at: int | None = None) -> Iterator[Process]:
    """The agent of two ranks, with what it and they say in output.txt; killed at the end."""
    with (run.path / "output.txt").open("w") as output:
        command = agent_command(run.path, 2, stop_at=stop_at)
        process = warm.popen(command, stdout=output, stderr=output)
    family = [psutil.Process(process.pid)]
    try:
        yield process
        family += _ranks(process)
    finally:
        process.kill()
        process.wait()
        for left_over in family[1:]:
            left_over.kill()


def said(run: RunDir) -> str:
    return (run.path / "output.txt").read_text()


def _children(process: Process, module: str) -> list[psutil.Process]:
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            with suppress(psutil.Error):
                if module in child.cmdline():
                    found.append(child)
    return found


def _ranks(process: Process) -> list[psutil.Process]:
    return _children(process, "bigbatch.trainers.worker")


def rank_of_start(run: RunDir, process: Process, rank: int, restart: int) -> psutil.Process:
    """The process of a rank in the agent's start number `restart`, from 0, as soon as it is there.

    By what its environment says: another rank of the start before may still be dying.
    """
    wanted = {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(restart)}
    while True:
        for child in _ranks(process):
            with suppress(psutil.Error):
                if wanted.items() <= child.environ().items():
                    return child
        assert process.poll() is None, said(run)
        time.sleep(0.02)


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal: proc(5), SigCgt."""
    fields = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return bool(int(fields["SigCgt"], 16) >> (number - 1) & 1)


def wait_for_step(run: RunDir, process: Process, step: int = 2) -> None:
    while not any(r["step"] >= step for r in read_jsonl(run.metrics)):
        assert process.poll() is None, said(run)
        time.sleep(0.05)


def test_a_users_error_is_one_message_and_status_2(run: RunDir, tmp_path: Path) -> None:
    broken = create_run(tmp_path / "b", load_recipe("digits", ["data.path=/nowhere"]))
    with agent(broken) as process:
        assert process.wait(120) == 2
    assert said(broken).count("data.path /nowhere is no folder here") == 1
    assert "Traceback" not in said(broken)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in FORWARD if n != 15)],
    ids=lambda n: n.name,
)
def test_a_signal_saves_the_step_and_ends_with_75(run: RunDir, number: signal.Signals) -> None:
    with agent(run) as process:
        wait_for_step(run, process)
        process.send_signal(number)
        assert process.wait(120) == SAVED
    (checkpoint,) = run.checkpoints.iterdir()
    last = max(r["step"] for r in read_jsonl(run.metrics))
    assert checkpoint.name == f"step-{last:08d}"
    assert said(run).count(f"saved after step {last}; go on with `bigbatch resume {run.path}`") == 1
    assert "Traceback" not in said(run)


@pytest.mark.slow
@pytest.mark.parametrize(("nproc", "number"), [(1, "TERM"), (2, "TERM"), (1, "INT"), (2, "INT")])
def test_a_signal_in_a_start_s_first_moments_ends_with_75(
    run: RunDir, nproc: int, number: str
) -> None:
    """`cancel` finds a process that still imports; nothing is lost, and it says what others say."""
    command = [sys.executable, "-P", "-m", "bigbatch.launcher.cli", "resume", str(run.path)]
    program = f"bigbatch.trainers.{'worker' if nproc == 1 else 'agent'}"
    with subprocess.Popen([*command, "--nproc", str(nproc)]) as process:
        while program not in psutil.Process(process.pid).cmdline():
            time.sleep(0.01)
        process.send_signal(signal.Signals[f"SIG{number}"])
        assert process.wait(120) == SAVED


@pytest.mark.slow
def test_all_ranks_start_again_after_one_was_killed(digits: Path, tmp_path: Path) -> None:
    changes = [f"data.path={digits}", "log.wandb=off", "checkpoint.every=3 steps"]
    run = create_run(tmp_path / "a", load_recipe("digits", changes))
    with agent(run, stop_at=12) as process:
        wait_for_step(run, process, 4)
        ranks = _ranks(process)
        rank_of_start(run, process, 0, 0).kill()
        states = set()
        while sum(e["kind"] == "start" for e in read_jsonl(run.events)) < 2:
            states.add(describe(run).state)
            assert process.poll() is None, said(run)
        assert states == {"running"}  # also while nobody holds the lock
        assert process.wait(200) == 0, said(run)
        assert not psutil.wait_procs(ranks, timeout=30)[1]
    assert describe(run).state == "stopped"
    assert "rank 0 was killed by SIGKILL" in said(run)
    assert "start again from step-" in said(run)
    assert [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == "train"] == [*range(1, 13)]
    first, second = (e["step"] for e in read_jsonl(run.events) if e["kind"] == "start")
    assert (first, second % 3) == (0, 0)
    assert second > 0


@pytest.mark.slow
def test_a_hung_rank_is_named_and_the_run_goes_on(digits: Path, tmp_path: Path) -> None:
    changes = [f"data.path={digits}", "log.wandb=off", "checkpoint.every=3 steps"]
    changes += ["recovery.stall_s=5"]
    run = create_run(tmp_path / "a", load_recipe("digits", changes))
    with agent(run, stop_at=12) as process:
        wait_for_step(run, process, 4)
        (hung,) = (r for r in _ranks(process) if r.environ()["RANK"] == "1")
        hung.suspend()
        assert process.wait(250) == 0, said(run)
    (stall,) = (e for e in read_jsonl(run.events) if e["kind"] == "stall")
    assert stall["missing"] == [1]
    assert "missing: rank 1 (" in said(run)
    assert json.loads((run.stacks / "collectives-00000.json").read_text())
    assert "loop.py" in (run.stacks / "rank-00000.txt").read_text()
    assert [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == "train"] == [*range(1, 13)]


@pytest.mark.slow
def test_an_error_that_repeats_ends_the_run(run: RunDir) -> None:
    """The other rank waits for the one that was killed, in code that answers no signal."""
    with agent(run) as process:
        for restart in range(4):  # the first start and three more
            rank = rank_of_start(run, process, 1, restart)
            rank_of_start(run, process, 0, restart).kill()
            # torch's agent kills what has not ended by itself after half a minute.
            assert rank.wait(60) in (SAVED, None)
        assert process.wait(120) == 128 + signal.SIGKILL
    assert said(run).count("start again from the beginning") == 3


@pytest.mark.slow
def test_a_second_run_in_one_directory_is_refused(run: RunDir) -> None:
    with agent(run) as process:
        wait_for_step(run, process)
        second = warm.run(agent_command(run.path, 1), capture_output=True, timeout=250)
        assert second.returncode == 2, second.stderr
        assert f"{run.path} is in use by process " in second.stderr
        assert process.poll() is None


@pytest.mark.slow
def test_no_rank_outlives_its_agent(run: RunDir) -> None:
    with agent(run) as process:
        wait_for_step(run, process)
        ranks = [*_ranks(process), *_children(process, SERVER)]
        process.kill()
        assert len(ranks) == 3
        assert not psutil.wait_procs(ranks, timeout=30)[1]


@pytest.mark.slow
def test_ranks_start_again_without_the_process_that_they_were_forked_from(
    digits: Path, tmp_path: Path
) -> None:
    changes = [f"data.path={digits}", "log.wandb=off", "checkpoint.every=3 steps"]
    run = create_run(tmp_path / "a", load_recipe("digits", changes))
    with agent(run, stop_at=9) as process:
        wait_for_step(run, process, 4)
        (parent,) = _children(process, SERVER)
        parent.kill()
        time.sleep(0.5)
        assert len(_ranks(process)) == 2
        rank_of_start(run, process, 1, 0).kill()
        assert process.wait(200) == 0, said(run)
    assert said(run).count("processes start from nothing") == 1, said(run)
    assert [r["step"] for r in read_jsonl(run.metrics) if r["kind"] == "train"] == [*range(1, 10)]


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait(run: RunDir) -> None:
    with agent(run) as process:
        wait_for_step(run, process)
        ranks = _ranks(process)
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)  # ranks that hang
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 128 + signal.SIGKILL
        assert not psutil.wait_procs(ranks, timeout=30)[1]


@pytest.mark.slow
def test_machines_that_do_not_meet(run: RunDir) -> None:
    command = agent_command(run.path, 1, nnodes=2, rdzv_endpoint="host.invalid:1")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "did not meet at host.invalid:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_before_all_machines_are_there(run: RunDir) -> None:
    endpoint = f"localhost:{free_port()}"
    command = agent_command(run.path, 1, nnodes=2, rdzv_endpoint=endpoint)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not _catches(process.pid, signal.SIGUSR2):
            time.sleep(0.05)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == SAVED
    assert f"SIGTERM while no rank ran; go on with `bigbatch resume {run.path}`" in said


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("runs/a")
    assert explain(1, 0, set(), run) == 1
    assert explain(SAVED, 0, {signal.SIGTERM}, run) == SAVED
    # Sent while the ranks were still importing: nothing is lost.
    assert explain(-signal.SIGTERM, 0, {signal.SIGTERM}, run) == SAVED
    assert explain(-signal.SIGTERM, 0, set(), run) == 128 + signal.SIGTERM
    assert explain(-signal.SIGKILL, 1, set(), run) == 128 + signal.SIGKILL
    assert "out of memory" in capsys.readouterr().err


def failures(*ended: tuple[int, int]) -> RunResult:
    """What torch's agent finds of ranks that ended one after another: rank and status."""
    found = {
        rank: SimpleNamespace(exitcode=status, timestamp=place)
        for place, (rank, status) in enumerate(ended)
    }
    return RunResult(WorkerState.FAILED, failures=found)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ended", "restarts"),
    [
        (((1, -9), (0, SAVED)), 3),  # ended by the agent itself, where it waited for the killed one
        (((0, SAVED), (1, SAVED)), 0),
        (((0, SAVED), (1, 1)), 0),  # a queue's signal to each of them
        (((0, 1), (1, 2)), 0),  # the one that says why is not always the first
    ],
)
def test_after_what_ranks_start_again(
    ended: tuple[tuple[int, int], ...],
    restarts: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, _: failures(*ended))
    agent = Agent.__new__(Agent)
    agent._run_path, agent._signals = tmp_path, SimpleNamespace(sent=set())  # type: ignore[assignment]
    agent._seen, agent._remaining_restarts = set(), 3
    agent._monitor_workers(SimpleNamespace(spec=SimpleNamespace(max_restarts=3)))  # type: ignore[arg-type]
    assert agent._remaining_restarts == restarts


def test_restarts_are_counted_from_the_last_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = failures((0, 1))
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, group: failed)
    group: Any = SimpleNamespace(spec=SimpleNamespace(max_restarts=3))
    agent = Agent.__new__(Agent)
    agent._run_path, agent._signals = tmp_path, SimpleNamespace(sent=set())  # type: ignore[assignment]
    agent._seen = set()
    # A damaged checkpoint, which the run went back from, stays ahead of it.
    left = []
    for step in (8, 8, 5, 5, 6):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
        agent._remaining_restarts = left[-1] - 1 if left else 0
        agent._monitor_workers(group)
        left.append(agent._remaining_restarts)
    assert left == [3, 2, 3, 2, 3]


def test_every_signal_that_a_rank_listens_to_is_passed_on() -> None:
    assert set(CAUGHT) <= set(FORWARD)
    assert set(FORWARD.values()) <= set(CAUGHT)
