"""`bigbatch train --members K`: one recipe with K seeds, as runs of their own on this machine."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.configs.identity import differences, summary
from bigbatch.configs.load import change_recipe
from bigbatch.configs.rundir import RunDir, create_run, member_paths
from bigbatch.configs.schema import Recipe
from bigbatch.launcher.child import Child, Children, steps_done, tail
from bigbatch.launcher.env import shares_of_gpus
from bigbatch.trainers.recovery.signals import SAVED, catch

_POLL_S = 0.2
_SAY_S = 10.0


def member_recipes(recipe: Recipe, count: int) -> list[Recipe]:
    """The recipe with the seeds seed, seed + 1, ...: other weights at the start, another order."""
    return [change_recipe(recipe, [f"seed={recipe.seed + k}"]) for k in range(count)]


def say(text: str) -> None:
    """To standard error, at once."""
    print(f"bigbatch: {text}", file=sys.stderr, flush=True)


def member_runs(path: Path, recipes: list[Recipe]) -> list[RunDir]:
    """PATH-0, PATH-1, ...: made here, or gone on with where they are there with these recipes.

    Raises UserError, before anything is made, where one is there with another recipe.
    """
    paths = member_paths(path, len(recipes))
    for run_path, recipe in zip(paths, recipes, strict=True):
        run = RunDir(run_path)
        if run.recipe_file.exists() and (found := differences(run.recipe(), recipe)):
            raise UserError(
                f"{run_path} is there with another recipe: {summary(found)}; choose another name "
                "with --run"
            )
    return [
        RunDir(p) if RunDir(p).recipe_file.exists() else create_run(p, r)
        for p, r in zip(paths, recipes, strict=True)
    ]


def train_members(
    runs: list[RunDir], nproc: int, at_once: int, say: Callable[[str], None] = say
) -> int:
    """Train the runs that are not finished, and say how to combine them; the exit status."""
    status = train_runs(runs, nproc, at_once, "the same command", say)
    if status == 0:
        names = " ".join(str(run.path) for run in runs)
        out = runs[0].name.rpartition("-")[0]
        say(f"combine them: bigbatch ensemble {names} --out ensembles/{out}")
    return status


def train_runs(
    runs: list[RunDir], nproc: int, at_once: int, again: str, say: Callable[[str], None] = say
) -> int:
    """Train the runs that are not finished, `at_once` at a time; returns the exit status.

    `again` is what goes on with them. A signal reaches those that run, which save and end; the
    others are not started.
    """
    waiting = [run for run in runs if not run.summary.exists()]
    for run in runs:
        if run not in waiting:
            say(f"{run.path} is finished")
    cores = len(os.sched_getaffinity(0)) // (nproc * min(at_once, max(1, len(waiting))))
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, cores)
    shares = shares_of_gpus(nproc, at_once, os.environ)
    going: dict[Child, list[str]] = {}  # and the GPUs that each has to itself
    failed: list[RunDir] = []
    stopped, said = False, time.monotonic()
    asked: list[int] = []  # Ctrl-C reaches the runs by itself, a signal to this process does not
    before = catch(lambda number, frame: asked.append(number), signal.SIGTERM, signal.SIGHUP)
    before |= catch(signal.default_int_handler, signal.SIGINT)
    children = Children(nproc, threads, to_the_end=True)
    try:
        while going or (waiting and not stopped):
            while waiting and len(going) < at_once and not stopped:
                run = waiting.pop(0)
                say(f"{run.path} starts")
                gpus = shares.pop(0)
                going[children.start(run, gpus=gpus)] = gpus
            time.sleep(_POLL_S)
            if asked:
                asked.clear()
                stopped = True
                for child in going:
                    child.stop()
            for child in [child for child in going if child.poll() is not None]:
                shares.append(going.pop(child))
                status = child.poll()
                stopped |= status == SAVED
                if status == 0:
                    end = "is finished" if child.run.summary.exists() else "has made its steps"
                    say(f"{child.run.path} {end}")
                elif status != SAVED:
                    failed.append(child.run)
                    say(f"{child.run.path} ended with status {status}:\n{tail(child.run)}")
            if time.monotonic() - said > _SAY_S and going:
                said = time.monotonic()
                say(", ".join(f"{c.run.name} at step {steps_done(c.run):,}" for c in going))
    except KeyboardInterrupt:  # the runs have got it as well
        stopped = True
    finally:
        for child in going:
            child.wait()
        children.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        say(f"stopped and saved; {again} goes on")
        return SAVED
    return 1 if failed else 0


def run_members(recipe: Recipe, path: Path, count: int, nproc: int, at_once: int) -> int:
    """Make the runs, and train them."""
    return train_members(member_runs(path, member_recipes(recipe, count)), nproc, at_once)
