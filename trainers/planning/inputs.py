"""What a recipe's names and durations come to once its data is open. Free of torch."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.configs.batch import ByNoise
from bigbatch.configs.data import Data
from bigbatch.configs.distill import Distill
from bigbatch.configs.errors import UserError
from bigbatch.configs.printable import printable
from bigbatch.configs.rundir import ENSEMBLE
from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import in_words
from bigbatch.configs.stream import refuse_commands
from bigbatch.configs.words import plural
from bigbatch.data.geometry import Growth
from bigbatch.data.index import Index, open_index
from bigbatch.data.lanes import LaneOrder
from bigbatch.data.order import Order, build_order
from bigbatch.data.remote import open_remote, remote_at
from bigbatch.data.repeats import RepeatedOrder
from bigbatch.data.staging import is_url
from bigbatch.trainers.planning.plan import Plan, make_plan
from bigbatch.trainers.planning.plateau import Evaluations
from bigbatch.trainers.planning.schedules import build_schedule
from bigbatch.trainers.planning.sizes import image_sizes
from bigbatch.trainers.planning.strength import class_strengths
from bigbatch.trainers.planning.targets import moved, outputs_of

Schedule = Callable[[int], float]  # multiplies the learning rate, after s finished steps

_FEW_STEPS = 50
_USUAL_TEST = str(Data.model_fields["test"].default)


@dataclass(frozen=True)
class Inputs:
    """The open data of a recipe, the order of its samples, and which step does what."""

    splits: dict[str, Index]  # by role: train but for a stream, val, and test where named
    order: Order | None  # None: a stream, which has none
    epoch_samples: int  # of a stream: of the whole run
    plan: Plan
    schedule: Schedule
    sizes: Growth = ()  # of images by step, where they change
    strengths: tuple[float, ...] | None = None  # of augmentation by class, where they differ
    momentum: Schedule | None = None  # of the optimizer, after s finished steps
    notes: tuple[str, ...] = ()  # what a user should know, though nothing is refused
    stop_at: int | None = None  # where this start of the run ends, if the run goes on beyond it
    outputs: tuple[str, ...] = ()  # what the network gives, by name: the classes, or numbers

    @property
    def classes(self) -> tuple[str, ...]:
        return self.splits["val"].classes


def open_inputs(
    recipe: Recipe, stop_at: int | None = None, evaluations: Evaluations = ()
) -> Inputs:
    """Open the indexes that a recipe names and fit its durations to them.

    `evaluations` is the run's list of them, which a schedule with a plateau looks at.
    Raises UserError with the remedy for whatever would stop a run at its start.
    """
    data, root = recipe.data, Path(recipe.data.path)
    if recipe.distill is not None:
        see_teacher(recipe.distill)
    if not is_url(data.path) and not os.path.isdir(root):
        source = "digits" if root.name == "digits" else "SOURCE"
        raise UserError(
            f"data.path {root} is no folder here ({Path.cwd()}); write the shards with "
            f"`bigbatch shard {source} {root}`, or set data.path=FOLDER"
        )
    refuse_commands(data.stream or (), os.environ)
    train = data.train if data.stream is None else None
    names = {"train": train, "val": data.val, "test": data.test}
    notes = []
    if data.test == _USUAL_TEST and not is_url(data.path) and not (root / _USUAL_TEST).exists():
        names["test"] = None  # nobody asked for it by another name
        notes.append(f"{root} has no split test: the run reports scores of {data.val} alone")
    splits = {role: open_split(data, name) for role, name in names.items() if name is not None}
    classes = splits["val"].classes
    for role, index in splits.items():
        if index.classes != classes:
            raise UserError(
                f"split {names[role]} of {data.path} has classes {list(index.classes)[:8]}, split "
                f"{data.val} has {list(classes)[:8]}: write both with one `bigbatch shard`"
            )
    outputs = outputs_of(recipe, splits)
    if told := moved(recipe):
        notes.append(told)
    if data.stream is None:
        order = open_order(recipe, splits["train"])
        epoch_samples = order.epoch_samples
        if data.repeats > 1:
            notes.append(
                f"data.repeats = {data.repeats}: an epoch of {epoch_samples:,} images shows "
                f"{epoch_samples // data.repeats:,} samples, each in {data.repeats} views"
            )
    else:  # no duration is in epochs, so that the whole run may stand for one
        order = None
        line = recipe.timeline(1)
        epoch_samples = line.first(line.steps(recipe.duration))
    plan, schedule = fit(recipe, epoch_samples, stop_at, evaluations)
    notes += few_samples(data.val, splits["val"]) + few_steps(recipe, plan)
    if not isinstance(recipe.global_batch, int):
        notes.append(f"global_batch: {batches_in_words(plan)}")
    if isinstance(recipe.global_batch, ByNoise):
        notes.append(still_open(recipe, plan))
    momentum = momentum_schedule(recipe, plan)
    sizes = image_sizes(recipe, epoch_samples)
    if sizes:
        steps = ", ".join(f"{in_words(size)} from step {first:,}" for first, size in sizes)
        notes.append(f"data.progressive: images of {steps}")
    return Inputs(
        splits,
        order,
        epoch_samples,
        plan,
        schedule,
        sizes,
        class_strengths(recipe, classes, splits.get("train")),
        momentum,
        tuple(notes),
        stop_at,
        outputs,
    )


def replanned(inputs: Inputs, recipe: Recipe, evaluations: Evaluations) -> Inputs:
    """The same inputs under the plan of `recipe`, which has decided on more of its batches."""
    plan, schedule = fit(recipe, inputs.epoch_samples, inputs.stop_at, evaluations)
    momentum = momentum_schedule(recipe, plan)
    return replace(inputs, plan=plan, schedule=schedule, momentum=momentum)


def few_samples(name: str, val: Index) -> list[str]:
    """What to say of classes that no sample of the validation split is of."""
    missing = np.flatnonzero(val.class_counts == 0)
    if not len(missing) or not len(val):
        return []
    shown = ", ".join(printable(val.classes[c]) for c in missing[:3])
    more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
    return [
        f"split {name} has no sample of {shown}{more}: nothing is measured of "
        f"{'these classes' if more or len(missing) > 1 else 'this class'}"
    ]


def few_steps(recipe: Recipe, plan: Plan) -> list[str]:
    """What to say of a run of few steps, where the recipe counts in something else."""
    if plan.total >= _FEW_STEPS or recipe.duration.unit == "steps":
        return []
    return [
        f"duration {recipe.duration} is {plural(plan.total, 'step')} in all: a smaller "
        f"global_batch than {recipe.first_batch:,}, or a longer duration, makes more"
    ]


def see_teacher(distill: Distill) -> None:
    """Raise UserError where no teacher can be: what it is made of is looked at by who loads it."""
    path = Path(distill.teacher)
    if (path / ENSEMBLE).is_file():
        if distill.members != "auto":
            raise UserError(
                f"distill.members = {distill.members}, but {path} is an ensemble, and its members "
                "are fixed; leave it at auto, or name a run"
            )
    elif not (path / "recipe.yaml").is_file():
        raise UserError(
            f"distill.teacher = {path} is neither a run (it holds no recipe.yaml) nor an ensemble "
            f"(no {ENSEMBLE}) here ({Path.cwd()}); name the directory of one"
        )


def open_split(data: Data, name: str) -> Index:
    """Open the index of a split, here or on remote storage."""
    if not is_url(data.path):
        root = Path(data.path)
        if root.is_dir() and not (root / name).exists():
            there = sorted(p.name for p in root.iterdir() if (p / "index").is_dir())
            write = "write it by `bigbatch shard SOURCE DEST --split 0.8,0.1,0.1`"
            remedies = {
                data.test: "set data.test=null to train without one, or name one by data.test=NAME",
                data.val: f"{write}, or name one by data.val=NAME",
            }
            raise UserError(
                f"{root} has no split {name}, but {', '.join(there) or 'none at all'}; "
                f"{remedies.get(name, 'name one of them')}"
            )
        return open_index(root / name)
    url = f"{data.path.rstrip('/')}/{name}"
    return open_remote(remote_at(url, data.cache, data.cache_gb))


def open_order(recipe: Recipe, index: Index) -> Order:
    """The order in which a recipe goes through an index."""
    data = recipe.data
    if not data.lanes:
        order = build_order(data.sampling, index, recipe.seed)
        if data.repeats > 1:
            return RepeatedOrder(order, data.repeats, recipe.micro_batch)
        return order
    return LaneOrder(
        index, recipe.seed, lanes=data.lanes, window=data.window, micro_batch=recipe.micro_batch
    )


def fit(
    recipe: Recipe,
    epoch_samples: int,
    stop_at: int | None = None,
    evaluations: Evaluations = (),
) -> tuple[Plan, Schedule]:
    """The plan of a run, and its schedule, for an epoch of this many samples.

    The schedule's value multiplies optimizer.lr; the batch rule (optimizer.scale) is in it.
    """
    plan = make_plan(recipe, epoch_samples, stop_at)
    if plan.timeline.is_open:
        _fastest_plan(recipe, epoch_samples)  # refuses what would not fit into it
    lr_multiplier = _by_samples(recipe.schedule, plan, evaluations)
    scale, batch = recipe.lr_scale, recipe.global_batch
    if isinstance(batch, int):
        return plan, lambda step: scale * lr_multiplier(step)
    by_batch = batch.lr_factor
    return plan, lambda step: scale * by_batch(plan.timeline.batch(step)) * lr_multiplier(step)


def _by_samples(config: Any, plan: Plan, evaluations: Evaluations = ()) -> Schedule:
    """A schedule as a function of finished steps: of the samples that they have taken.

    It is built for steps of one unit of the timeline, and asked where the coming step begins. Of a
    constant batch a unit is a step.
    """
    line = plan.timeline
    try:
        factor = build_schedule(
            config,
            total_steps=plan.units,
            global_batch=line.unit,
            epoch_samples=line.epoch_samples,
            evaluations=evaluations,
            place=line.units,
        )
    except UserError as error:
        if not line.changes:
            raise
        raise UserError(
            f"{error} (where global_batch changes, in steps of {line.unit} samples)"
        ) from None
    return (lambda step: factor(line.units(step))) if line.changes else factor


def _fastest_plan(recipe: Recipe, epoch_samples: int) -> Plan:
    """The plan of a run that doubles its batch at every decision. UserError where that has none."""
    batch = recipe.global_batch
    assert isinstance(batch, ByNoise)
    fastest = recipe.model_copy(update={"global_batch": batch.fastest(epoch_samples)})
    return make_plan(fastest, epoch_samples)


def still_open(recipe: Recipe, plan: Plan) -> str:
    """What a batch that is decided on while training leaves open, in words."""
    batch = recipe.global_batch
    assert isinstance(batch, ByNoise)
    least = _fastest_plan(recipe, plan.timeline.epoch_samples).total
    return (
        f"the batch doubles, up to {batch.most:,}, where {batch.target:g} times the noise scale "
        f"reaches twice the batch, looked at every {batch.every}: {least:,} to {plan.total:,} steps"
    )


def batches_in_words(plan: Plan) -> str:
    """Which batch begins at which step, the first and last ones of many."""
    line = plan.timeline
    parts = [
        f"{batch:,} from step {start:,}" if start < plan.total else f"{batch:,} never"
        for start, batch in zip(line.starts, line.batches, strict=True)
    ]
    shown = [*parts[:5], "...", parts[-1]] if len(parts) > 7 else parts
    return f"{', '.join(shown)} of {plan.total:,}"


def momentum_schedule(recipe: Recipe, plan: Plan) -> Schedule | None:
    """The momentum of each step, where the recipe lets it change.

    Raises UserError where it would leave (0, 1]: with none, torch's SGD forgets its velocity.
    """
    config = getattr(recipe.optimizer, "momentum_schedule", None)
    if config is None:
        return None
    most: float = recipe.optimizer.momentum  # type: ignore[union-attr]
    try:
        factor = _by_samples(config, plan)
    except UserError as error:
        raise UserError(f"optimizer.momentum_schedule: {error}") from None
    for step in range(plan.total):
        if not 0 < most * factor(step) <= 1:
            raise UserError(
                f"optimizer.momentum_schedule makes the momentum of step {step} "
                f"{most * factor(step):g}; keep it above 0 and at most 1, by warmup_start or final"
            )
    return lambda step: most * factor(step)
