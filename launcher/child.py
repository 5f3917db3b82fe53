"""A run as a child of this process: started, watched through its files, stopped by a signal."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import psutil

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import iter_jsonl, read_jsonl
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.configs.transfer import Gradual
from bigbatch.launcher.env import forget_launch, start_variables
from bigbatch.launcher.launchers import python
from bigbatch.launcher.start import agent_command
from bigbatch.trainers.warm.parent import OF_A_RANK, OF_AN_END, Parent, Process, start_parent

OUTPUT = "output.txt"  # what the processes of the run said, in its directory
_POLL_S = 0.1


class RunFailed(Exception):
    """A run that should have gone through ended otherwise; the message says what it said."""


class Children:
    """Starts runs of `nproc` ranks on this machine, warm: forked from one that has torch.

    `threads` of each rank; None: as `bigbatch train` chooses them. `to_the_end`: the runs make
    their reports. The environment is that of now.
    """

    def __init__(self, nproc: int, threads: int | None = None, *, to_the_end: bool = False) -> None:
        self._nproc = nproc
        self._modules = (*OF_A_RANK, *(OF_AN_END if to_the_end else ()), "bigbatch.trainers.agent")
        chosen = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self._env = {**os.environ, **start_variables(nproc, 1, None, os.environ), **chosen}
        forget_launch(self._env, None)

    @cached_property
    def parent(self) -> Parent:
        """The process that the runs are forked from; it starts with the first of them."""
        return start_parent(self._modules, self._env)

    def start(
        self,
        run: RunDir,
        stop_at: int | None = None,
        nproc: int | None = None,
        *,
        gpus: Sequence[str] = (),
    ) -> "Child":
        """Start a run, or go on with it; with `nproc` ranks if that is given, as many threads.

        On these `gpus` alone, if any are named. UserError where its directory takes no file.
        """
        env = self._env | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
        command = agent_command(run.path.absolute(), nproc or self._nproc, stop_at=stop_at)
        try:
            output = (run.path / OUTPUT).open("ab")
        except OSError as error:  # such as a run that was removed while others trained
            raise UserError(f"cannot start {run.path}: {error}") from None
        with output:
            process = self.parent.popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        return Child(run, process)

    def run(self, module: str, arguments: Sequence[str], run: RunDir) -> int:
        """Run another module, as one process, to its end; its exit status. It says what it says
        where the run did."""
        with (run.path / OUTPUT).open("ab") as output:
            process = self.parent.popen(
                [*python(module), *arguments],
                env=self._env,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return process.wait()

    def close(self) -> None:
        """Runs that have been started go on."""
        if "parent" in self.__dict__:
            self.parent.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Child:
    """One start of a run. A Ctrl-C reaches the run as well: it saves, and ends by itself."""

    def __init__(self, run: RunDir, process: Process) -> None:
        self.run = run
        self.process = process

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        return self.process.poll()

    def stop(self) -> None:
        """Ask it to save and end: a signal that the loop answers after the step."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL all its processes, the agent first: nobody is left who could tidy up."""
        kill_tree(self.process.pid)
        self.process.wait()

    def wait(self, watch: Callable[[], None] = lambda: None) -> int:
        """Wait for the end, calling `watch` meanwhile; an exception stops the run first."""
        try:
            while (status := self.process.poll()) is None:
                watch()
                time.sleep(_POLL_S)
            return status
        finally:
            self.stop()
            self.process.wait()


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything that it started, and wait until all are gone."""
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes[1:], timeout=60)


def bare_recipe(recipe: Recipe, steps: int) -> dict[str, Any]:
    """The recipe's tree for a run of `steps` steps, and nothing beside them.

    One step longer than what is to be run: a run that reaches its end would evaluate.
    """
    tree = recipe.model_dump(mode="json")
    tree["duration"] = f"{steps + 1} steps"
    tree["global_batch"] = recipe.first_batch  # where it changes, the one that lr is for
    tree["evaluate"]["every"] = tree["checkpoint"]["every"] = f"{steps + 1} steps"
    tree["log"] |= {"every": 1, "wandb": "off", "trace": False}
    tree["optimizer"].pop("momentum_schedule", None)  # of the whole run, as the schedule is
    tree["loss"].pop("class_weights_from", None)  # they count in all steps: the end may lie before
    tree["phases"] = None  # what is measured is the trunk
    tree["data"]["progressive"] = None  # so that what is measured is of the whole size
    if tree["average"] is not None:  # of the same size, and none that starts after the end
        tree["average"] = {"name": "ema", "half_life": "1 steps"}
    if isinstance(recipe.transfer, Gradual):  # as it is once all of its stages learn
        tree["transfer"] = _unfrozen(recipe.transfer)
    return tree


def _unfrozen(transfer: Gradual) -> dict[str, Any] | None:
    rates = transfer.model_dump(mode="json", include={"stage_decay", "rates"})
    if transfer.stages:
        return {"name": "frozen", "stages": transfer.stages, **rates}
    several = transfer.stage_decay != 1.0 or transfer.rates
    return {"name": "all", **rates} if several else None


def steps_done(run: RunDir) -> int:
    """The last step that is recorded as finished; 0 before the first."""
    newest = iter_jsonl(run.metrics, b'"train"', newest_first=True)
    return next((r["step"] for r in newest if r.get("kind") == "train"), 0)


def losses(run: RunDir) -> tuple[list[float], list[float]]:
    """Learning rates and losses of the recorded steps; a loss that is not finite is NaN."""
    records = [r for r in read_jsonl(run.metrics, b'"train"') if r.get("kind") == "train"]
    values = [float("nan") if r["loss"] is None else float(r["loss"]) for r in records]
    return [float(r["lr"]) for r in records], values


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_jsonl(run.events, f'"{kind}"'.encode()) if e.get("kind") == kind]


def tail(run: RunDir, lines: int = 15) -> str:
    """The end of what the run said."""
    path: Path = run.path / OUTPUT
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-lines:])
