"""New runs that branch off a checkpoint of another one. Free of torch."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigbatch.configs.batch import ByNoise
from bigbatch.configs.decisions import KIND, Decisions, following, recipe_of
from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json, write_atomically
from bigbatch.configs.identity import differences, recipe_hash, summary, tree_differences
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.judged import judged_by
from bigbatch.configs.rundir import RunDir, check_name, create_run, event_record
from bigbatch.configs.schema import Recipe
from bigbatch.configs.timeline import Timeline
from bigbatch.trainers.models.weights_file import describe, read_header, read_info
from bigbatch.trainers.monitoring.log import cut_records, cut_rows
from bigbatch.trainers.planning.early_stop import best_evaluation, stops
from bigbatch.trainers.planning.inputs import Inputs, open_inputs
from bigbatch.trainers.planning.plan import Plan
from bigbatch.trainers.planning.plateau import read_evaluations
from bigbatch.trainers.planning.swap import branched_off
from bigbatch.trainers.recovery.stored import (
    AVERAGE,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    STATISTICS,
    CorruptCheckpoint,
    checkpoint_path,
    list_checkpoints,
    list_snapshots,
    measure,
    snapshot_step,
    step_of,
    verify,
)

_NO_TENSORS = (8).to_bytes(8, "little") + b"{}      "  # a safetensors file without one


@dataclass(frozen=True)
class Branch:
    """A run to be made: `recipe` goes on after `step` finished steps of its own batch size."""

    path: Path
    recipe: Recipe
    step: int
    content: dict[str, Any]  # state.json of its first checkpoint
    kept: tuple[str, ...]  # files of the parent's checkpoint that it takes as they are
    same_batch: bool  # steps are the parent's, and so are records of them
    same_cycles: bool  # and snapshots
    same_samples: int  # the first ones of its order are the parent's, and so are rows of them
    best: Path | None  # the checkpoint that early stopping may yet go back to
    notes: tuple[str, ...]  # what a user should know, such as what it starts without


def find_checkpoint(parent: RunDir, step: int | None) -> Path:
    """The checkpoint after `step` finished steps, or the newest; verified. UserError otherwise."""
    paths = {step_of(path): path for path in list_checkpoints(parent.checkpoints)}
    if not paths:
        raise UserError(f"{parent.path} holds no checkpoint to branch off; train it first")
    if step is not None and step not in paths:
        there = ", ".join(str(number) for number in sorted(paths)[-20:])
        raise UserError(
            f"{parent.path} holds no checkpoint after step {step}; it has those after steps "
            f"{there} (checkpoint.keep_every keeps more of them)"
        )
    path = paths[max(paths) if step is None else step]
    try:
        verify(path)
    except CorruptCheckpoint as error:
        raise UserError(f"{error}; branch off another step with --step") from None
    return path


def plan_branch(parent: RunDir, checkpoint: Path, path: Path, recipe: Recipe) -> Branch:
    """What a run at `path` with `recipe` takes over of a checkpoint, as whole training.

    The position is kept in samples: another global_batch counts its own steps up to there.
    Raises UserError, with the remedy, where the checkpoint and the recipe do not go together.
    """
    before = recipe_of(parent)
    check_name(path.name)
    inputs = open_inputs(recipe)
    there = _timeline(before, inputs)
    decided = _decided(before, recipe, there.first(step_of(checkpoint)))
    if decided:
        recipe = following(recipe, decided)
        inputs = open_inputs(recipe)
    here = inputs.plan.timeline
    step = branch_step(step_of(checkpoint), there, inputs.plan, path.name)
    _check_network(checkpoint, before, recipe, inputs.outputs)
    same_batch = step > 0 and there.upto(step).stretches == here.upto(step).stretches
    # By what the recipes say: the parent may have decided more than the branch has seen.
    batches = [r.model_dump(include={"global_batch"}) for r in (before, recipe)]
    same_batches = batches[0] == batches[1]
    if recipe.schedule.name == "plateau" and not same_batch:
        raise UserError(
            "schedule plateau looks at the evaluations of all steps, and those of another "
            "global_batch have other numbers; choose another schedule for the branch"
        )
    content = parse_json((checkpoint / STATE).read_bytes())
    fingerprint = dict(content["fingerprint"])
    fingerprint["recipe"] = recipe.model_dump(mode="json")
    order = "stream" if inputs.order is None else inputs.order.hash
    same_order = order != "stream" and fingerprint.get("order_hash") == order
    fingerprint["order_hash"] = order
    content |= {"step": step, "fingerprint": fingerprint, "batches": [list(d) for d in decided]}
    kept, notes = [MODEL, OPTIMIZER], list(inputs.notes)
    if content.get("precise_bn", False):
        kept.append(STATISTICS)
    same_learning = before.transfer == recipe.transfer
    if _optimizers(before) != _optimizers(recipe) or not same_learning:
        why = "" if same_learning else ", for another transfer lets other weights learn"
        notes.append(f"optimizer {recipe.optimizer.name} starts without state{why}")
        kept.remove(OPTIMIZER)
        content["optimizer"] = {}
    elif step and _betas_power(before, there.batch(step_of(checkpoint) - 1)) != _betas_power(
        recipe, here.batch(step - 1)
    ):
        notes.append(
            "global_batch.betas: the optimizer's moments were kept by other betas than the branch "
            "corrects them by; for a while its updates are too short or too long"
        )
    if content.get("averaged", 0):
        if same_batches and same_learning and before.average == recipe.average:
            kept.append(AVERAGE)
        else:
            content["averaged"] = 0
            if recipe.average is not None:
                notes.append(f"the average ({recipe.average.name}) starts anew")
    if before.precision != recipe.precision:
        content["scaler"] = None
    if recipe.loss.name == "confusion_cost" and not (
        same_batch and before.loss.name == "confusion_cost"
    ):
        notes.append("costs of loss confusion_cost are all 1 until the first evaluation")
    if not same_batch:
        content |= {"losses": [], "over": []}
    same = before.schedule == recipe.schedule and before.duration == recipe.duration
    return Branch(
        path,
        recipe,
        step,
        content,
        tuple(kept),
        same_batch,
        same_batches and same,
        here.first(step) if same_order else 0,
        _best_so_far(parent, step, recipe) if same_batch else None,
        tuple(notes),
    )


def _decided(before: Recipe, recipe: Recipe, samples: int) -> Decisions:
    """What the parent had decided about its batch by then and the branch could have: it stands."""
    theirs, ours = before.global_batch, recipe.global_batch
    if not (isinstance(theirs, ByNoise) and isinstance(ours, ByNoise)):
        return []
    decided = [(at, batch) for at, batch in theirs.decided if at <= samples]
    fits = theirs.start == ours.start and all(batch in ours.sizes for _, batch in decided)
    return decided if fits else []


def _betas_power(recipe: Recipe, batch: int) -> float:
    rules = recipe.global_batch
    return 1.0 if isinstance(rules, int) else rules.betas_power(batch)


def _optimizers(recipe: Recipe) -> tuple[str, str | None]:
    """By name: the optimizer, and Muon's second one. State is theirs."""
    rest = getattr(recipe.optimizer, "rest", None)
    return recipe.optimizer.name, None if rest is None else rest.name


def _best_so_far(parent: RunDir, step: int, recipe: Recipe) -> Path | None:
    """The parent's best checkpoint of those up to `step`, the ones that early stopping compares."""
    early_stop = recipe.regularise.early_stop
    evaluations = read_evaluations(parent.metrics, step)
    if early_stop is None or not evaluations:
        return None
    if stops(early_stop, evaluations, judged_by(recipe)):
        raise UserError(
            f"regularise.early_stop ends the branch where it begins, after step {step}: branch off "
            "an earlier step, raise its patience, or set regularise.early_stop=null"
        )
    path = checkpoint_path(parent.checkpoints, best_evaluation(evaluations, judged_by(recipe)).step)
    if not path.is_dir():
        raise UserError(
            f"regularise.early_stop may go back to the best evaluation, and {path} is not there "
            "any more; drop it, or branch off with another global_batch, which looks at none"
        )
    return path


def _timeline(before: Recipe, inputs: Inputs) -> Timeline:
    """Which samples the parent's steps took."""
    if isinstance(before.global_batch, int):
        return before.timeline(inputs.epoch_samples)
    return open_inputs(before).plan.timeline  # pieces may be in epochs of its own data


def branch_step(step: int, there: Timeline, plan: Plan, name: str) -> int:
    """Steps of a branch that have seen as many samples as `step` ones of its parent.

    UserError where these are no whole number of steps, or the branch called `name` is over then.
    """
    here, samples = plan.timeline, there.first(step)
    found = here.reaching(samples)
    if here.first(found) != samples:
        raise UserError(
            f"step {step} of global_batch {there.batch(max(0, step - 1))} is {samples:,} samples, "
            f"no whole number of steps of global_batch {here.batch(max(0, found - 1))}; take a "
            "batch that divides it, or branch off another step"
        )
    if found >= plan.total:
        raise UserError(
            f"{name} would have no step left: its {plan.total} steps are over after {found}; set a "
            "longer duration"
        )
    return found


def _check_network(
    checkpoint: Path, before: Recipe, recipe: Recipe, classes: tuple[str, ...]
) -> None:
    """Raise UserError where the recipe asks for other weights than the checkpoint holds."""
    if found := tree_differences(_network(before), _network(recipe)):
        raise UserError(
            f"a branch goes on with its parent's network: {summary(found)}; leave it as it is, or "
            "train a new run (model.checkpoint starts from weights)"
        )
    info = read_info(read_header(checkpoint / MODEL))
    if info is not None and info.classes != describe(recipe, classes).classes:
        raise UserError(
            f"{checkpoint} was trained on other classes than {recipe.data.path} has; a branch "
            "needs the same ones, in the same order"
        )


def _network(recipe: Recipe) -> dict[str, Any]:
    """What decides which tensors a checkpoint holds, and by whom it was taught."""
    learned = "its centres" if recipe.loss.name == "center" else "nothing"
    distill = recipe.distill
    taught = {} if distill is None else distill.model_dump(exclude={"teacher", "cache", "cache_gb"})
    return {
        "model": recipe.model.form(),
        "loss learns": learned,
        "channels": recipe.data.channels,
        "distill": taught,
    }


def make_branches(parent: RunDir, checkpoint: Path, branches: Sequence[Branch]) -> list[RunDir]:
    """Make the runs, each whole or not at all; one that is there already is gone on with.

    Raises UserError, before any is made, where another run has its place.
    """
    check_places(parent, step_of(checkpoint), {b.path: b.recipe for b in branches})
    return [_make(parent, checkpoint, branch) for branch in branches]


def _origin(parent: RunDir, step: int) -> dict[str, Any]:
    recipe = parent.recipe()
    return {
        "run": str(parent.path.absolute()),
        "recipe_hash": recipe_hash(recipe),
        "step": step,
    }


def check_places(
    parent: RunDir,
    step: int,
    recipes: Mapping[Path, Recipe],
    remedy: str = "choose another name with --run",
) -> None:
    """Raise UserError where a place is taken by anything but that branch of `step`."""
    for path, recipe in recipes.items():
        check_name(path.name)
        if not path.exists():
            continue
        there = RunDir(path)
        why = "is no run"
        if there.recipe_file.is_file():
            origin, ours = there.forked_from or {}, _origin(parent, step)
            if not branched_off(there, parent) or any(
                origin.get(k) != ours[k] for k in ("recipe_hash", "step")
            ):
                where = f" ({origin.get('run')}, step {origin.get('step')})" if origin else ""
                why = f"is another run, or branched off elsewhere{where}"
            elif found := differences(there.recipe(), recipe):
                why = f"has another recipe: {summary(found)}"
            else:
                continue
        raise UserError(f"{path} exists and {why}; {remedy}")


def _make(parent: RunDir, checkpoint: Path, branch: Branch) -> RunDir:
    if branch.path.exists():
        return RunDir(branch.path)
    folder = branch.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In a folder of its own until it is whole: without its checkpoint it would start at 0.
        with tempfile.TemporaryDirectory(prefix=".fork-", dir=folder) as temporary:
            run = create_run(Path(temporary) / branch.path.name, branch.recipe)
            _fill(run, parent, checkpoint, branch)
            run.path.rename(branch.path)
    except OSError as error:
        raise UserError(f"cannot make {branch.path}: {error}; free some space there") from None
    return RunDir(branch.path)


def _fill(run: RunDir, parent: RunDir, checkpoint: Path, branch: Branch) -> None:
    snapshots = []
    if branch.same_cycles:
        for path in list_snapshots(parent.snapshots):
            step = snapshot_step(path)
            if step is None:
                raise UserError(
                    f"{path} does not say after which step it was taken (metrics.json); restore "
                    "it, or change schedule or duration, which leaves the snapshots out"
                )
            if step <= branch.step:
                snapshots.append(path.name)
                shutil.copytree(path, run.snapshots / path.name)
    if branch.same_batch:
        for records, copy in ((parent.metrics, run.metrics), (parent.ledger, run.ledger)):
            if records.exists():
                shutil.copyfile(records, copy)
                cut_records(copy, branch.step)  # what is beyond it no step of the branch has made
    if branch.same_samples and branch.recipe.log.samples and parent.samples.exists():
        shutil.copyfile(parent.samples, run.samples)
        cut_rows(run.samples, branch.same_samples, recording=True)
    target = checkpoint_path(run.checkpoints, branch.step)
    target.mkdir(parents=True)
    for name in branch.kept:
        shutil.copyfile(checkpoint / name, target / name)
    if OPTIMIZER not in branch.kept:
        (target / OPTIMIZER).write_bytes(_NO_TENSORS)
    write_atomically(target / STATE, to_json(branch.content, indent=1))
    if branch.best is not None and step_of(branch.best) != branch.step:
        shutil.copytree(branch.best, run.checkpoints / branch.best.name)
    files = {path.name: measure(path) for path in sorted(target.iterdir())}
    write_atomically(target / MANIFEST, to_json({"step": branch.step, "files": files}, indent=1))
    origin = _origin(parent, step_of(checkpoint)) | {"at": branch.step, "snapshots": snapshots}
    manifest = json.loads(run.manifest.read_text(encoding="utf-8")) | {"forked_from": origin}
    write_atomically(run.manifest, to_json(manifest, indent=2) + "\n")
    event = event_record("fork", branch.step) | {"run": origin["run"], "from_step": origin["step"]}
    decided = [
        event_record(KIND, branch.step) | {"samples": samples, "global_batch": batch}
        for samples, batch in branch.content.get("batches", [])
    ]
    write_atomically(run.events, "".join(to_json(e) + "\n" for e in (event, *decided)))
