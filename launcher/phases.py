"""SWAP as one run: a trunk, workers that branch off its end, and the average of their weights.

Each part is what a person could start by hand: the trunk an ordinary run, the workers those of
`bigbatch fork TRUNK --members K`, the average that of `bigbatch ensemble --soup uniform`. What is
finished is not done again, so the same command goes on from wherever it was stopped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.load import change_recipe
from bigbatch.configs.notices import notice
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.configs.words import plural
from bigbatch.launcher import members
from bigbatch.launcher.env import Peers
from bigbatch.launcher.fork import (
    branch_step,
    check_places,
    find_checkpoint,
    make_branches,
    plan_branch,
)
from bigbatch.trainers.planning.inputs import open_inputs
from bigbatch.trainers.planning.plan import largest_world
from bigbatch.trainers.planning.swap import unfinished, worker_runs
from bigbatch.trainers.recovery.stored import CorruptCheckpoint, checkpoint_path, verify


@dataclass(frozen=True)
class Workers:
    """The workers of a recipe, and where in it they begin."""

    recipes: tuple[Recipe, ...]  # by seed
    trunk: int  # steps of the trunk
    start: int  # the same place in steps of a worker
    total: int  # of a worker

    def in_words(self) -> str:
        first = self.recipes[0]
        return (
            f"swap: behind step {self.trunk:,} {len(self.recipes)} workers of "
            f"{self.total - self.start:,} steps of {first.first_batch:,} samples each, on up to "
            f"{plural(largest_world(first), 'rank')}, and the average of their weights"
        )


def plan_workers(recipe: Recipe) -> Workers | None:
    """The workers of a recipe, None of one without. Opens the data.

    They are what `bigbatch fork --members` makes of the trunk with `changes`. A worker's schedule
    is of its own part: before it stands a constant, which is never asked for. UserError, with the
    remedy, where workers cannot go on from the trunk.
    """
    own = recipe.phases
    if own is None:
        return None
    inputs = open_inputs(recipe)
    there, trunk = inputs.plan.timeline, inputs.plan.total
    samples = there.first(trunk)
    total = samples + own.global_batch * own.duration.steps(own.global_batch, inputs.epoch_samples)
    before = {"length": f"{samples} samples", "schedule": {"name": "constant"}}
    pieces = [before, {"schedule": own.schedule.model_dump(mode="json", exclude_unset=True)}]
    changes = [
        f"global_batch={own.global_batch}",
        f"duration={total} samples",
        f"schedule={to_json({'name': 'sequence', 'pieces': pieces})}",
    ]
    changes += [] if own.micro_batch is None else [f"micro_batch={own.micro_batch}"]
    changes += [] if own.lr is None else [f"optimizer.lr={own.lr!r}"]
    try:
        first = change_recipe(recipe, ["phases=null", *changes], say=None)
        plan = open_inputs(first).plan
        start = branch_step(trunk, there, plan, "a worker")
    except UserError as error:
        raise UserError(f"phases: a worker cannot go on from the trunk: {error}") from None
    recipes = members.member_recipes(first, own.workers)
    return Workers(tuple(recipes), trunk, start, plan.total)


def check_starts_here(seeds: int | None, peers: Peers | None, elsewhere: bool = False) -> None:
    """Raise UserError where this process cannot start the runs of a recipe with phases.

    `seeds`: what --members says; `elsewhere`: others than this machine's torchrun were asked for.
    """
    if seeds is not None:
        raise UserError(
            f"--members {seeds}: a recipe with phases trains workers by itself; leave it out, or "
            "add phases=null"
        )
    if peers is not None or elsewhere:
        raise UserError(
            "a recipe with phases starts its trunk and its workers itself, on this machine: leave "
            "out other launchers and --nnodes, or train the trunk there with phases=null, and "
            "branch its workers off by `bigbatch fork`"
        )


def check_new(path: Path, recipe: Recipe) -> None:
    """Raise UserError for what would stop a new run at `path` at its workers, hours later."""
    plan_workers(recipe)
    for worker in worker_runs(RunDir(path), recipe):
        if worker.path.exists() and not path.exists():  # else it is the run that is to go on
            raise UserError(
                f"{worker.path} is there, where a worker of {path.name} goes; remove it, or choose "
                "another name with --run"
            )


def train_phases(
    run: RunDir, nproc: int, at_once: int, say: Callable[[str], None] = members.say
) -> int:
    """Do what is still to be done of a run with phases; returns the exit status.

    The trunk has `nproc` ranks, which `at_once` workers side by side share; none has more of them
    than its step has micro-batches.
    """
    recipe = run.recipe()
    workers = plan_workers(recipe)
    assert workers is not None

    def train(runs: Sequence[RunDir], ranks: int, at_once: int = 1) -> int:
        return members.train_runs(list(runs), ranks, at_once, f"bigbatch resume {run.path}", say)

    if unfinished(run, recipe):
        places = [place.path for place in worker_runs(run, recipe)]
        recipes = dict(zip(places, workers.recipes, strict=True))
        back = f"put {run.name} and its workers where they were trained, or remove that one"
        check_places(run, workers.trunk, recipes, back)  # before the trunk takes its time
        if not _is_whole(run, workers.trunk) and (status := train([run], nproc)):
            return status
        checkpoint = find_checkpoint(run, workers.trunk)
        branches = [plan_branch(run, checkpoint, place, own) for place, own in recipes.items()]
        made = make_branches(run, checkpoint, branches)
        for note in branches[0].notes:
            notice(note)
        ranks = min(max(1, nproc // at_once), largest_world(workers.recipes[0]))
        if status := train(made, ranks, at_once):
            return status
    return train([run], nproc)


def _is_whole(run: RunDir, step: int) -> bool:
    """Whether the trunk's last checkpoint is there and verifies."""
    try:
        verify(checkpoint_path(run.checkpoints, step))
    except CorruptCheckpoint:
        return False
    return True
