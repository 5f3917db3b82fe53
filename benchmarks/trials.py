"""Trials of a study: runs of bigbatch's own trainer, several at a time, each noted once finished.

A trial is a frozen dataclass with a `name`, that of its run's directory.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def train(name: str, tree: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any] | None]:
    """Train, or go on training, FOLDER/runs/NAME in this process.

    Returns its RunDir, and its summary: None where it did not stay finite.
    """
    from bigbatch.configs.files import read_jsonl
    from bigbatch.configs.load import parse_recipe
    from bigbatch.configs.rundir import RunDir, create_run
    from bigbatch.trainers import worker
    from bigbatch.trainers.monitoring.output import close_output

    path = folder / "runs" / name
    run = RunDir(path) if path.exists() else create_run(path, parse_recipe(tree, name))
    kept = [os.dup(number) for number in (1, 2)]
    status = worker.main([str(path)])
    close_output()  # or what copies it into the run's log stays, and copies later runs' as well
    for number, old in enumerate(kept, 1):
        os.dup2(old, number)
        os.close(old)
    if status == 0:
        return run, json.loads(run.summary.read_text())
    if "non_finite" not in [event["kind"] for event in read_jsonl(run.events)]:
        raise RuntimeError(f"{name} ended with status {status}; see {folder / 'log.txt'}")
    return run, None


def _start_worker(log: Path, threads: int) -> None:
    """A process of the pool: what the trainer prints goes to a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch

    torch.set_num_threads(threads)


def open_pool(folder: Path, jobs: int, threads: int = 1) -> ProcessPoolExecutor:
    initial = (folder / "log.txt", threads)
    return ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, initial)


def noted(folder: Path) -> list[dict[str, Any]]:
    """The results in trials.jsonl."""
    notes = folder / "trials.jsonl"
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def run_all(
    pool: ProcessPoolExecutor | None,
    work: Callable[[T], dict[str, Any]],
    trials: Iterable[T],
    done: dict[T, dict[str, Any]],
    folder: Path,
) -> list[dict[str, Any]]:
    """Results of all trials, in their order; those that are `done` are not run again.

    `work` gives a trial's result, and can be pickled. Without a pool only those done are returned.
    """
    trials = list(trials)
    if pool is None:
        return [done[trial] for trial in trials if trial in done]
    waiting = {pool.submit(work, trial): trial for trial in trials if trial not in done}
    for number, future in enumerate(as_completed(waiting), 1):
        trial, result = waiting[future], future.result()
        done[trial] = result
        with (folder / "trials.jsonl").open("a") as file:
            print(json.dumps(result), file=file, flush=True)
        shown = "diverged" if result["val"] is None else f"val {100 * result['val']:.2f} %"
        print(f"{number}/{len(waiting)} {trial.name}: {shown}", file=sys.stderr, flush=True)
    return [done[trial] for trial in trials]
