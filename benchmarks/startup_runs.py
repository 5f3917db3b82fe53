"""Whole commands for benchmarks/startup.py, each by the code of one tree."""

import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from bigbatch.configs.files import read_jsonl
from bigbatch.trainers.monitoring.log import last_step

SHARDS = "shards/digits"  # where the recipe has them
STEP = re.compile(r"\S+ 1/[\d,]+ \(")  # the first line of progress in a pipe
TABLE = re.compile(r"\s*ensemble +[\d.]+%")
WORKER = "bigbatch.trainers.worker"
_PATIENCE_S = 600.0
SPACE = """\
objectives: [accuracy]
parameters:
  optimizer.lr: {type: float, low: 0.5, high: 4, log: true}
"""
TRIALS = 24


def environment(tree: Path) -> dict[str, str]:
    """Variables with which Python runs the code in `tree`, with a thread for each process."""
    typings = str(tree / "typings")
    return {**os.environ, "PYTHONPATH": typings, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "bigbatch.launcher.cli", *arguments]


def write_shards(tree: Path, folder: Path) -> None:
    if (folder / SHARDS).exists():
        return
    subprocess.run(
        command("shard", "digits", SHARDS),
        cwd=folder,
        env=environment(tree),
        check=True,
        capture_output=True,
    )


@contextmanager
def started(tree: Path, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command whose output can be read line by line; nothing of it outlives this."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment(tree),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            left = [process, *psutil.Process(process.pid).children(recursive=True)]
            for each in reversed(left):
                each.kill()
        process.wait()


def train(tree: Path, folder: Path, name: str, *changes: str) -> dict[str, float]:
    """The main job: seconds to each of its marks, and what its ranks hold at the first step."""
    begun, found, lines = time.perf_counter(), dict[str, float](), list[str]()
    arguments = ("train", "digits", "--nproc", "2", "--run-name", name, *changes)
    with started(tree, folder, *arguments) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            now = time.perf_counter() - begun
            if "to_first_step_s" not in found and STEP.match(line):
                found["to_first_step_s"] = now
                found |= memory(process.pid)
            if TABLE.match(line):
                found["to_table_s"] = now
        if process.wait() or not {"to_first_step_s", "to_table_s"} <= found.keys():
            raise SystemExit("".join(lines[-30:]) or f"{name} said nothing")
    return found | {"whole_s": time.perf_counter() - begun}


def ranks(pid: int) -> list[psutil.Process]:
    """The processes of ranks below a process, with those that copy their output, forks of them."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if WORKER in process.cmdline():
                found.append(process)
    return found


def memory(pid: int) -> dict[str, float]:
    """MiB by share (PSS), of the ranks together and of all below a process: shared pages count."""
    own = sum(process.memory_full_info().pss for process in ranks(pid))
    everything = psutil.Process(pid).memory_full_info().pss
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            everything += process.memory_full_info().pss
    return {"ranks_pss_mib": own / 2**20, "all_pss_mib": everything / 2**20}


def restart(tree: Path, folder: Path, name: str) -> dict[str, float]:
    """Seconds from SIGKILL of a rank to the next finished step."""
    changes = ("log.every=1", "checkpoint.every=5 steps", "evaluate.every=60 epochs")
    run = folder / "runs" / name
    arguments = ("train", "digits", "--nproc", "2", "--run-name", name, *changes)
    with started(tree, folder, *arguments) as process:
        wait(lambda: bool(kinds(run / "events.jsonl", "checkpoint")), process)
        own = {rank.pid: rank for rank in ranks(process.pid)}
        # Not what copies a rank's output, which is a fork of it.
        [rank for rank in own.values() if rank.ppid() not in own][-1].kill()
        begun = time.perf_counter()
        wait(lambda: len(kinds(run / "events.jsonl", "start")) == 2, process)
        step = kinds(run / "events.jsonl", "start")[1]["step"]
        wait(lambda: last_step(run / "metrics.jsonl") > step, process)
        return {"to_next_step_s": time.perf_counter() - begun}


def many(count: int) -> Callable[[Path, Path, str], dict[str, float]]:
    """A measurement of `count` ranks, of 12 steps of 1,024 images in 32 micro-batches."""

    def measure(tree: Path, folder: Path, name: str) -> dict[str, float]:
        changes = ("duration=12 steps", "global_batch=1024", "micro_batch=32", "log.every=1")
        changes += ("schedule={name: constant}", "optimizer.lr=0.1", "log.wandb=off")
        run, found = folder / "runs" / name, dict[str, float]()
        begun, clock = time.perf_counter(), time.time()
        arguments = ("train", "digits", "--nproc", str(count), "--run-name", name, *changes)
        with started(tree, folder, *arguments) as process:
            reading = threading.Thread(target=process.communicate)  # a full pipe stops it
            reading.start()
            metrics = run / "metrics.jsonl"
            wait(lambda: metrics.exists() and len(kinds(metrics, "train")) >= 3, process)
            found |= memory(process.pid)
            reading.join()
            if process.wait():
                raise SystemExit(f"{name} ended with {process.returncode}")
        (start,) = kinds(run / "events.jsonl", "start")
        steps = [step["step_s"] for step in kinds(metrics, "train")]
        found |= {"to_start_s": start["time"] - clock, "step_s": statistics.median(steps[4:])}
        return found | {"whole_s": time.perf_counter() - begun}

    return measure


def kinds(path: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_jsonl(path) if r["kind"] == kind] if path.exists() else []


def wait(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not there():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{process.args} has ended, or takes longer than {_PATIENCE_S:.0f} s")
        time.sleep(0.01)


def timed(*arguments: str) -> Callable[[Path, Path, str], dict[str, float]]:
    """A measurement of a whole command; {name} in its arguments is new for each."""

    def measure(tree: Path, folder: Path, name: str) -> dict[str, float]:
        (folder / "space.yaml").write_text(SPACE)
        filled = [argument.format(name=name) for argument in arguments]
        begun = time.perf_counter()
        done = subprocess.run(
            command(*filled), cwd=folder, env=environment(tree), capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(filled)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return {"whole_s": time.perf_counter() - begun}

    return measure


_EPOCH = ("duration=1 epochs", "schedule={{name: constant}}", "log.wandb=off")
_TUNE = ("tune", "digits", "space.yaml", "--trials", str(TRIALS), "--sampler", "random")
_TUNE += ("--study", "studies/{name}")
CASES: dict[str, Callable[[Path, Path, str], dict[str, float]]] = {
    "train": train,
    "restart": restart,
    "2-ranks": many(2),
    "16-ranks": many(16),
    "find-lr": timed("find-lr", "digits"),
    "prove": timed("prove", "digits"),
    "tune": timed(*_TUNE, *_EPOCH),
    "tune-2": timed(*_TUNE, "--parallel", "2", *_EPOCH),
}
