"""The teacher that a recipe names, fit for its student, and what is kept of its outputs."""

from pathlib import Path
from typing import Any

from bigbatch.configs.distill import Distill
from bigbatch.configs.errors import UserError
from bigbatch.configs.notices import notice
from bigbatch.configs.schema import Recipe
from bigbatch.trainers.distillation.kept import KeptOutputs, key_of, record_size, reserve
from bigbatch.trainers.distillation.teacher import Teacher
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.ensemble.folder import Ensemble, open_ensemble
from bigbatch.trainers.ensemble.members import require_labels
from bigbatch.trainers.models.weights_file import unlike
from bigbatch.trainers.planning.inputs import Inputs

_FORMAT = 1  # of views: another number where the same recipe gives other pixels or outputs
# What decides neither a pixel of any view nor what a teacher says of it. The training split is
# known by the hash of its order; whatever else a recipe says counts.
_NO_VIEW: dict[str, Any] = {
    **dict.fromkeys(
        ("name", "duration", "phases", "backend", "reduction", "clip", "model", "loss"), True
    ),
    **dict.fromkeys(("distill", "optimizer", "schedule", "average", "checkpoint"), True),
    **dict.fromkeys(("recovery", "regularise", "ensemble", "log", "transfer"), True),
    "data": {
        *("path", "train", "val", "test", "cache", "cache_gb", "workers", "threads"),
        *("bad_samples", "image_size", "progressive"),
    },
    "augment": {"mean", "std"},
    "evaluate": {"every", "batch", "image_size", "precise_bn", "precise_bn_images"},
}


def open_teacher(recipe: Recipe, inputs: Inputs, engine: Engine, runs: Path) -> Teacher | None:
    """The teacher of a recipe, if it names one; by default `runs` is where its outputs are kept.

    Raises UserError where it cannot teach this student. Collective.
    """
    distill = recipe.distill
    if distill is None:
        return None
    ensemble = open_ensemble([Path(distill.teacher)], distill.members)
    check_teacher(ensemble, recipe, inputs.classes)
    teacher = Teacher(ensemble, recipe, engine, distill.outputs, hint_of(distill), inputs.strengths)
    known: str = engine.from_main(teacher.hash)
    if teacher.hash != known:
        raise UserError(
            f"distill.teacher = {distill.teacher} has other weights here ({teacher.hash}) than on "
            f"rank 0 ({known}); give every machine the same files, then start again"
        )
    kept = _keep(distill, teacher, recipe, inputs, engine, runs)
    if kept is not None:
        teacher.keep(kept)
    return teacher


def hint_of(distill: Distill) -> tuple[str, int] | None:
    """The layer of each member that a hint is taken from, and its grid."""
    hint = distill.hint
    return None if hint is None else (hint.teacher_layer or hint.layer, hint.grid)


def check_teacher(ensemble: Ensemble, recipe: Recipe, classes: tuple[str, ...]) -> None:
    """Raise UserError where a teacher knows other classes, or images, than its student."""
    require_labels(ensemble.members, "distill")
    member = ensemble.members[0]  # all of them are alike in this
    if member.recipe.data.channels != recipe.data.channels:
        raise UserError(
            f"teacher {member.name} sees {member.recipe.data.channels} channels, the student "
            f"{recipe.data.channels}; set data.channels={member.recipe.data.channels}, or choose "
            "another teacher"
        )
    if how := unlike(member.classes, classes, "the student"):
        raise UserError(
            f"teacher {member.name} has {how}; train both on shards with the same classes.txt"
        )


def view_of(recipe: Recipe, teacher: Teacher, order_hash: str, device: str) -> dict[str, Any]:
    """All that a teacher's outputs follow from, beside (step, micro-batch).

    Machines and versions round otherwise, as they do in training; kinds of device also crop in
    another way.
    """
    return {
        "format": _FORMAT,
        "teacher": teacher.hash,
        "order": order_hash,
        "decoded_for": teacher.decoded_size,
        "device": device,
        "outputs": teacher.kind,
        "hint": teacher.hint,
        "recipe": recipe.model_dump(mode="json", exclude=_NO_VIEW, exclude_defaults=True),
    }


def _keep(
    distill: Distill, teacher: Teacher, recipe: Recipe, inputs: Inputs, engine: Engine, runs: Path
) -> KeptOutputs | None:
    """The outputs of earlier passes, and room for those of this one, as far as there is any."""
    if not distill.cache_gb:
        return None
    if inputs.order is None:  # a stream: its numbers are no samples' names
        if engine.rank == 0:
            notice("the teacher's outputs are not kept: data.stream draws other samples each time")
        return None
    folder = Path(distill.cache) if distill.cache is not None else runs / ".teacher-outputs"
    view = view_of(recipe, teacher, inputs.order.hash, engine.device.type)
    rows, width, total = recipe.micro_batch, teacher.width, inputs.plan.total
    line = inputs.plan.timeline
    # By units of the timeline: where the batch changes, steps take different room.
    each = line.unit // rows
    unit_bytes = each * record_size(rows, width, distill.outputs)
    limit = int(distill.cache_gb * 1e9)

    def make_room() -> int:
        try:
            units = reserve(
                folder, view, steps=line.units(total), step_bytes=unit_bytes, limit=limit
            )
        except OSError as error:
            notice(f"the teacher's outputs are not kept: {error}; set distill.cache=FOLDER")
            return 0
        steps = line.within(units)
        if steps < total:
            notice(
                f"{folder}: distill.cache_gb = {distill.cache_gb:g} leaves room for the teacher's "
                f"outputs of {steps:,} of {total:,} steps, {unit_bytes / 1e6:,.1f} MB each"
                f"{f' {line.unit:,} samples' if line.changes else ''}; those "
                "of the others are computed by every student. Raise it, set "
                "distill.outputs=float16, or remove folders of old teachers there"
            )
        return steps

    steps: int = engine.on_main(make_room)
    if steps == 0:
        return None
    try:
        return KeptOutputs(
            folder / key_of(view),
            steps=steps,
            first=lambda step: line.units(step) * each,
            rows=rows,
            width=width,
            kind=distill.outputs,
        )
    except OSError as error:  # another machine, which has no such folder
        notice(f"rank {engine.rank} does not keep the teacher's outputs: {error}")
        return None
