"""A run's training samples by the weights that it kept, on clean views. Free of torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from bigbatch.configs.decisions import recipe_of
from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.dynamics.look import Looked, check_order
from bigbatch.trainers.dynamics.rows import Rows
from bigbatch.trainers.dynamics.study import Dynamics, study
from bigbatch.trainers.planning.inputs import open_order, open_split
from bigbatch.trainers.recovery.stored import (
    list_checkpoints,
    list_snapshots,
    snapshot_step,
    step_of,
)


def kept_weights(run: RunDir, until: int | None = None) -> dict[int, str]:
    """Snapshots, and checkpoints of other steps, by step from old to new: up to `until`.

    UserError where there is none, or the run has no samples to come back to.
    """
    recipe = recipe_of(run)
    if recipe.data.stream is not None:
        raise UserError(f"{run.path} trained on data.stream, which has no index to go through")
    check_order(run, open_order(recipe, open_split(recipe.data, recipe.data.train)).hash)
    paths = [*list_checkpoints(run.checkpoints), *list_snapshots(run.snapshots)]
    found = {step_of_weights(path): path.name for path in paths}
    chosen = {step: found[step] for step in sorted(found) if until is None or step <= until}
    if not chosen:
        there = ", ".join(map(str, sorted(found))) or "none"
        raise UserError(
            f"{run.path} has no weights up to step {until}: it has those after steps {there}"
            if until is not None
            else f"{run.path} holds no weights yet: neither a snapshot nor a checkpoint"
        )
    return chosen


def step_of_weights(path: Path) -> int:
    """After how many steps a checkpoint or snapshot was taken. UserError where it does not say."""
    if path.name.startswith("step-"):
        return step_of(path)
    if (step := snapshot_step(path)) is None:
        raise UserError(f"{path} does not say its step: its metrics.json is missing or damaged")
    return step


def look_clean(run: RunDir, rows: Rows, steps: Sequence[int]) -> Looked:
    """What rows [M * N, 3] say: of all N samples by the weights after one of M `steps`, then those
    after the next one. A visit is one look by one set of weights."""
    recipe = recipe_of(run)
    index = open_split(recipe.data, recipe.data.train)
    found = study(rows, lambda positions: positions % len(index), len(index))
    if not found.seen.any():
        raise UserError(f"none of the {len(index):,} samples of {index.place} could be read")
    notes = tuple(_notes(found, len(steps)))
    return Looked(run, recipe, index, index.keys(), steps[-1], found, notes, tuple(steps))


def _notes(found: Dynamics, weights: int) -> Iterator[str]:
    if lost := int((~found.seen).sum()):
        yield f"{lost:,} samples could not be read, or have no finite value"
    if weights < 3:
        yield (
            f"{weights} of the run's weights are few: forgetting and variability need several; "
            "`checkpoint.keep_every` keeps more, also from before wrong labels were known by heart"
        )
