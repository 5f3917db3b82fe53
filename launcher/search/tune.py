"""`bigbatch tune`: trials as runs, reported to Optuna as their evaluations come in.

One loop starts trials, reads their files, prunes and collects them; the study's journal and
the run directories hold all that there is to know, so a killed search goes on from both.
"""

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.configs.schema import Recipe
from bigbatch.configs.space import COMPARED, Space, override
from bigbatch.configs.words import plural
from bigbatch.data.measured import with_measured
from bigbatch.launcher.child import Children, events, tail
from bigbatch.launcher.runs.registry import describe
from bigbatch.launcher.search import study
from bigbatch.launcher.search.trial import Elsewhere, Handle, Here, is_submitted, submit
from bigbatch.launcher.start import check_start
from bigbatch.trainers.planning.plateau import read_evaluations

_POLL_S = 0.05
_HOPELESS = 3  # trials that fail, with none that worked, before the search gives up
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Search:
    """What a search does: `folder` holds journal, trials and report."""

    recipe: str
    overrides: tuple[str, ...]
    space: Space
    folder: Path
    trials: int  # finished ones in the study, over all its starts
    parallel: int
    nproc: int
    slurm: tuple[str, ...] | None  # options of `bigbatch submit`; None: here
    reports: bool = False  # whether the recipe asks for one at the end of each run

    @property
    def threads(self) -> int | None:
        """Of each rank here: its share of the cores; None where the environment says it."""
        if "OMP_NUM_THREADS" in os.environ:
            return None
        return max(1, len(os.sched_getaffinity(0)) // (self.nproc * self.parallel))

    @property
    def own_overrides(self) -> list[str]:
        """What the search itself changes: a report would make a short trial take half as long
        again, and the best ones' are drawn at the end."""
        return [] if self.reports else ["log.report=false"]


@dataclass
class _Active:
    trial: Trial
    run: RunDir
    handle: Handle
    reported: int = field(default=0)
    pruned: bool = field(default=False)


class Interrupted(Exception):
    """A signal ended the search; the same command goes on with it."""


def run_search(
    search: Search, found: optuna.Study, say: Callable[[str, int], None] = lambda text, done: None
) -> None:
    """Fill the study up to `search.trials` finished trials.

    `say` is told of each change, and how many trials are finished. Raises Interrupted after
    SIGINT, SIGTERM or SIGHUP: trials here have then saved, jobs go on by themselves.
    """
    stopping = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    before = {number: signal.signal(number, interrupt) for number in _INTERRUPTS}
    active: list[_Active] = []
    children = Children(search.nproc, search.threads, to_the_end=search.reports)
    try:
        for frozen in found.get_trials(states=[TrialState.RUNNING]):
            if not stopping:
                trial = study.again(found, search.space, frozen)
                _begin(search, found, trial, active, children)
        while not stopping:
            while len(active) < search.parallel and _finished(found) + len(active) < search.trials:
                if stopping or _exhausted(search, found):
                    break
                _begin(search, found, study.ask(found, search.space), active, children)
            if not active:
                break
            for one in list(active):
                _look(search, found, one)
                if not one.handle.running() and not stopping:  # Ctrl-C reaches trials as well
                    active.remove(one)
                    _look(search, found, one)  # what came after the last look
                    say(_end(search, found, one), _finished(found))
            time.sleep(_POLL_S)
    finally:
        if search.slurm is None:
            for one in active:
                one.handle.stop()
            while any(one.handle.running() for one in active):
                time.sleep(_POLL_S)
        children.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopping:
        raise Interrupted


def changes(search: Search, trial: FrozenTrial | Trial) -> list[str]:
    """A trial as changes to the recipe."""
    chosen = study.values(search.space, trial.params)
    return [*search.overrides, *(override(key, value) for key, value in chosen.items())]


def run_of(search: Search, trial: FrozenTrial | Trial) -> RunDir:
    return RunDir(search.folder / "trials" / f"{trial.number:04d}")


def _finished(found: optuna.Study) -> int:
    return sum(t.state.is_finished() for t in found.get_trials(deepcopy=False))


def _exhausted(search: Search, found: optuna.Study) -> bool:
    """Whether a grid has no point left."""
    sampler = found.sampler
    return isinstance(sampler, optuna.samplers.GridSampler) and (
        len(found.get_trials(deepcopy=False)) >= study.grid_size(search.space)
    )


def _begin(
    search: Search,
    found: optuna.Study,
    trial: Trial,
    active: list[_Active],
    children: Children,
) -> None:
    """Start the run of a trial, or find the one that was started before."""
    run = run_of(search, trial)
    new = not run.path.exists() if search.slurm is None else not is_submitted(run)
    try:
        recipe = _check(search, changes(search, trial), run, new)
    except UserError as error:
        _check(search, search.overrides, run, new)  # not the trial's fault: this raises as well
        # Each value is allowed, but not all of them together.
        trial.set_user_attr("reason", str(error))
        found.tell(trial, state=_bad(search))
        return
    if search.slurm is None:
        handle = _begin_here(recipe, run, children)
    else:
        if new:
            overrides = [*search.own_overrides, *changes(search, trial)]
            submit(search.recipe, overrides, run, search.slurm)
        handle = Elsewhere(run)
    known = found.get_trials(deepcopy=False)[trial.number].intermediate_values
    active.append(_Active(trial, run, handle, len(known), "pruned" in trial.user_attrs))


def _check(search: Search, overrides: Sequence[str], run: RunDir, new: bool) -> Recipe:
    """The recipe with these changes. Raises UserError for what would end its run at the start."""
    overrides = [*search.own_overrides, *overrides]
    recipe = load_recipe(search.recipe, overrides, say=None)  # said of the space already
    check_start(recipe)
    if search.slurm is not None and new:
        submit(search.recipe, overrides, run, search.slurm, "--dry-run", "--no-check")
    return with_measured(recipe)


def _begin_here(recipe: Recipe, run: RunDir, children: Children) -> Handle:
    if not run.recipe_file.exists():
        shutil.rmtree(run.path, ignore_errors=True)  # killed while it was made
        create_run(run.path, recipe)
    elif run.summary.exists() or describe(run).state == "running":
        return Elsewhere(run)
    return Here(run, children)


def _look(search: Search, found: optuna.Study, one: _Active) -> None:
    """Report new evaluations; prune by them."""
    metric = search.space.objectives[0]
    if len(search.space.objectives) > 1 or metric not in COMPARED or one.pruned:
        return
    seen = read_evaluations(one.run.metrics, 1 << 62)
    for number in range(one.reported, len(seen)):
        value = seen[number].scores.get(metric)
        one.reported = number + 1
        if value is None:
            continue
        one.trial.report(value, number + 1)
        # A run that has made its last evaluation is as good as done.
        if not one.run.summary.exists() and one.trial.should_prune():
            one.pruned = True
            one.trial.set_user_attr("pruned", True)
            one.handle.stop()
            return


def _end(search: Search, found: optuna.Study, one: _Active) -> str:
    """Tell the study how a trial ended; returns a line about it."""
    name = f"trial {one.trial.number}"
    if one.pruned and not one.run.summary.exists():
        found.tell(one.trial, state=TrialState.PRUNED)
        return f"{name} pruned after {plural(one.reported, 'evaluation')}"
    outcome = outcomes(one.run, search.space)
    if outcome is not None:
        found.tell(one.trial, outcome)
        pairs = zip(search.space.objectives, outcome, strict=True)
        return f"{name}: " + ", ".join(f"{o} {v:.4g}" for o, v in pairs)
    if events(one.run, "non_finite"):
        one.trial.set_user_attr("reason", "loss, gradient or running statistics were not finite")
        found.tell(one.trial, state=_bad(search))
        return f"{name} diverged"
    one.trial.set_user_attr("reason", tail(one.run, 3) or "the run left no result")
    found.tell(one.trial, state=TrialState.FAIL)
    trials = found.get_trials(deepcopy=False)
    failed = sum(t.state == TrialState.FAIL for t in trials)
    if failed >= _HOPELESS and all(t.state != TrialState.COMPLETE for t in trials):
        raise UserError(
            f"{plural(failed, 'trial')} failed and none worked; the last one, {one.run.path}, "
            f"said:\n{tail(one.run)}"
        )
    return f"{name} failed; see {one.run.path}"


def _bad(search: Search) -> TrialState:
    """The state that teaches a sampler to keep away, where Optuna knows one."""
    return TrialState.PRUNED if len(search.space.objectives) == 1 else TrialState.FAIL


def outcomes(run: RunDir, space: Space) -> list[float] | None:
    """The objectives of a finished run; None where it is not finished, or has none.

    Scores are those of the last evaluation of the validation split, seconds
    the time in training steps. The test split has no part in any choice.
    """
    if not run.summary.exists():
        return None
    seconds = parse_json(run.summary.read_bytes())["seconds"]
    records: list[dict[str, Any]] = [
        r
        for r in read_jsonl(run.metrics, b'"eval"')
        if r.get("kind") == "eval" and r.get("split") == "val"
    ]
    scores = {**(records[-1] if records else {}), "seconds": seconds}
    values = [scores.get(objective) for objective in space.objectives]
    if any(v is None or not math.isfinite(v) for v in values):
        return None
    return [float(v) for v in values if v is not None]
