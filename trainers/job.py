"""Everything that a run is built from, put together once from its recipe."""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from pydantic import JsonValue
from torch import Tensor, nn

from bigbatch.configs.batch import PostLocal
from bigbatch.configs.decisions import Decisions, following
from bigbatch.configs.errors import UserError
from bigbatch.configs.files import write_atomically
from bigbatch.configs.notices import notice
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import height_width
from bigbatch.data.augment.pipeline import Augmenter, contact_sheet
from bigbatch.data.batch import BatchPlan, Decoding, MicroBatch
from bigbatch.data.geometry import View
from bigbatch.data.journal import journal_file
from bigbatch.data.loader import train_batches
from bigbatch.trainers.distillation.build import open_teacher
from bigbatch.trainers.distillation.teacher import Teacher
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.engine.freezing import Freezing
from bigbatch.trainers.evaluation.evaluate import Evaluator
from bigbatch.trainers.evaluation.precise_bn import PreciseBatchNorm, check_precise
from bigbatch.trainers.losses.build import (
    Course,
    Objective,
    build_objective,
    build_student_objective,
)
from bigbatch.trainers.losses.penalty import penalised
from bigbatch.trainers.losses.priors import ClassCounts
from bigbatch.trainers.models.batch_stats import check_state
from bigbatch.trainers.models.build import build_augmenter, build_model, choose_memory_format
from bigbatch.trainers.models.convert import check_sizes
from bigbatch.trainers.models.initialise import prior_bias
from bigbatch.trainers.models.regularise import keep_within, regularise
from bigbatch.trainers.models.weights_file import describe
from bigbatch.trainers.monitoring.jsonl import JsonLines
from bigbatch.trainers.monitoring.stage import stage
from bigbatch.trainers.optim import build_optimizer
from bigbatch.trainers.optim.averaging import WeightAverage
from bigbatch.trainers.optim.stages import fit_transfer, freeze, rate_table
from bigbatch.trainers.planning.inputs import Inputs, open_inputs, replanned
from bigbatch.trainers.planning.plan import check_world
from bigbatch.trainers.planning.plateau import Evaluation
from bigbatch.trainers.recovery.checkpoint import TrainState

_SHOWN_IMAGES = 32
# So many this process decodes before another one for it would have started.
_FEW_IMAGES = 64


@dataclass(frozen=True)
class Job:
    """A run on this rank, ready to start or to go on."""

    run: RunDir
    recipe: Recipe
    engine: Engine
    inputs: Inputs
    model: nn.Module
    objective: Objective
    augmenter: Augmenter
    evaluator: Evaluator
    precise_bn: PreciseBatchNorm
    state: TrainState
    teacher: Teacher | None = None
    freezing: Freezing | None = None  # where parts of the network begin to learn later
    rates: tuple[dict[str, JsonValue], ...] = ()  # of a transfer: what learns at which rate
    course: Course = field(default_factory=Course)

    def views(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """A micro-batch as the objective takes it: augmented images, and targets."""
        images, targets = self.augmenter.train(batch)
        if self.teacher is None:
            return images, targets
        return images, torch.cat([targets, self.teacher.outputs(batch)], 1)

    def following(self, decided: Decisions) -> "Job":
        """The same under the plan of what a run has decided about its batch."""
        recipe, state = following(self.recipe, decided), self.state
        inputs = replanned(self.inputs, recipe, state.evaluations)
        if state.average is not None and (averaging := inputs.plan.average) is not None:
            state.average.follow(averaging.steps, averaging.updates)
        precise_bn = replace(self.precise_bn, timeline=inputs.plan.timeline)
        return replace(self, recipe=recipe, inputs=inputs, precise_bn=precise_bn)

    def batches(self, start: int, stop: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of steps `start` to `stop`."""
        rank, world = self.engine.rank, self.engine.world
        journal = journal_file(self.run.path, rank)
        return self._batches(start, stop, rank, world, journal)

    def _batches(
        self, start: int, stop: int, rank: int, world: int, journal: Path | None
    ) -> Iterator[MicroBatch]:
        recipe, view = self.recipe, self.augmenter.view
        if self.teacher is not None:
            view = replace(view, out=self.teacher.decoded_size, growth=())
        plan = BatchPlan(self.inputs.plan.timeline, recipe.micro_batch, rank, world, start, stop)
        return training_batches(recipe, self.inputs, plan, view, self.engine.device, journal)

    def micro_batch(self, step: int, index: int) -> MicroBatch:
        """One micro-batch of the step that follows `step` finished ones, whoever computes it."""
        world = self.inputs.plan.micro_batches(step)  # each is a rank's only one
        return next(self._batches(step, step + 1, index, world, None))

    def traced_batches(self, start: int, stop: int) -> Generator[MicroBatch, None, None]:
        """The same, each noted in trace/ where the recipe asks for it."""
        path = self.run.trace / f"rank-{self.engine.rank:05d}.jsonl"
        trace: JsonLines | None = None
        if self.recipe.log.trace:
            try:
                path.parent.mkdir(exist_ok=True)
                trace = JsonLines(path)
            except OSError as error:  # training needs no trace
                notice(f"no trace of this attempt: {error}")
        try:
            for batch in self.batches(start, stop):
                if trace is not None:
                    record = {"step": batch.step, "micro": batch.index}
                    refusal = trace.append(record | {"samples": batch.samples.tolist()})
                    if refusal:
                        notice(f"{path} ends before step {batch.step + 1}: {refusal}")
                        trace.close()
                        trace = None
                yield batch
        finally:
            if trace is not None:
                trace.close()

    def save_contact_sheet(self) -> None:
        """A picture of step 0's first images as the model sees them, before mixup."""
        data, recipe = self.recipe.data, self.recipe
        here = self
        if recipe.micro_batch <= _FEW_IMAGES:
            alone = data.model_copy(update={"workers": 0})
            here = replace(self, recipe=recipe.model_copy(update={"data": alone}))
        first = here._batches(0, 1, 0, recipe.micro_batches, None)
        sheet = contact_sheet(self.augmenter.images(next(first))[:_SHOWN_IMAGES])
        picture = Image.fromarray(sheet[..., 0] if data.channels == 1 else sheet)
        zoom = max(1, 96 // min(height_width(self.augmenter.view.at(0).out)))
        size = picture.width * zoom, picture.height * zoom
        content = BytesIO()
        picture.resize(size, Image.Resampling.NEAREST).save(content, "PNG")
        # All or nothing: a start that finds the picture makes no other one.
        write_atomically(self.run.contact_sheet, content.getvalue())


def training_batches(
    recipe: Recipe,
    inputs: Inputs,
    plan: BatchPlan,
    view: View,
    device: torch.device,
    journal: Path | None = None,
    *,
    whole: bool = False,
) -> Iterator[MicroBatch]:
    """The plan's micro-batches of what a recipe trains on, decoded for `view`.

    `whole`: also what it does not show of large images.
    """
    data = recipe.data
    decoding = Decoding(
        image_size=max(height_width(view.out)),
        channels=data.channels,
        workers=data.workers,
        threads=data.threads,
        bad_samples=data.bad_samples,
        journal=journal,
        pin_memory=device.type == "cuda",
        view=None if whole else view,
    )
    if inputs.order is None:
        from bigbatch.data.stream import stream_batches  # webdataset: for a stream alone

        assert data.stream is not None
        classes = len(inputs.classes)
        return stream_batches(data.stream, plan, decoding, classes=classes, seed=recipe.seed)
    return train_batches(inputs.splits["train"], inputs.order, plan, decoding)


def build_job(run: RunDir, recipe: Recipe, engine: Engine, stop_at: int | None) -> Job:
    """Open the data, and build order, plan, model and optimizer. Raises UserError."""
    check_world(recipe, engine.world)
    data = recipe.data
    evaluations: list[Evaluation] = []  # the state's; a plateau looks at them
    stage("opening the data")
    inputs = open_inputs(recipe, stop_at, evaluations)
    check_same_data(inputs, engine)
    classes = len(inputs.outputs)
    info = describe(recipe, inputs.outputs)
    stage("building the model")
    model = build_model(
        recipe.model,
        classes=classes,
        channels=data.channels,
        seed=recipe.seed,
        image_size=data.image_size,
        head_prior=head_prior(recipe, inputs),
        info=info,
        quiet=engine.rank != 0,
    )
    check_sizes(
        model,
        data.channels,
        data.image_size,
        [
            ("evaluate.image_size", recipe.eval_size),
            *(("data.progressive", size) for _, size in inputs.sizes),
        ],
        recipe.model.name,
    )
    learning = fit_transfer(recipe, model, inputs.epoch_samples)
    freeze(model, learning)
    own = recipe.regularise
    regularise(model, own)
    teacher = open_teacher(recipe, inputs, engine, run.path.parent)
    counts, course = class_counts(inputs), Course(inputs.plan.weights_from)
    if recipe.distill is None:
        objective = build_objective(recipe.loss, model, counts, course)
    else:
        objective = build_student_objective(recipe.loss, recipe.distill, model, counts, course)
    if own.l1 or own.l2:
        objective = penalised(objective, model, own.l1, own.l2)
    probe(model, objective, recipe, classes)
    model.to(memory_format=choose_memory_format(recipe.model, engine.device))
    optimizer = build_optimizer(model, recipe.optimizer, learning)
    rates = rate_table(model, learning, optimizer, recipe.lr_scale) if recipe.transfer else []
    if own.max_norm is not None:
        keep_within(optimizer, model, own.max_norm)
    check_precise(recipe, model)
    engine.prepare(model, optimizer, recipe.common_batch // recipe.micro_batch)
    if isinstance(recipe.global_batch, PostLocal):
        apart = recipe.global_batch.workers
        each = recipe.first_batch // apart // recipe.micro_batch
        engine.train_apart(apart, each, recipe.clip)
    if recipe.model.compile:
        engine.compile()
    freezing = None
    if recipe.transfer is not None and recipe.transfer.name == "gradual":
        freezing = Freezing(learning, engine, optimizer, engine.module)
    augmenter = build_augmenter(recipe, classes, engine.device, inputs)
    evaluator = Evaluator(engine, augmenter, recipe)
    precise_bn = precise_statistics(recipe, inputs, engine)
    order_hash = "stream" if inputs.order is None else inputs.order.hash
    fingerprint: dict[str, JsonValue] = {
        "recipe": recipe.model_dump(mode="json"),
        "order_hash": order_hash,
    }
    if teacher is not None:
        fingerprint["teacher_hash"] = teacher.hash
    averaging = inputs.plan.average
    average = None
    if averaging is not None:
        average = WeightAverage(
            engine.own_weights(), averaging.steps, averaging.decay_rate, averaging.updates
        )
    state = TrainState(
        0,
        model,
        engine.optimizer,
        engine.scaler,
        fingerprint,
        engine.pieces,
        evaluations=evaluations,
        info=info,
        average=average,
    )
    return Job(
        run=run,
        recipe=recipe,
        engine=engine,
        inputs=inputs,
        model=model,
        objective=objective,
        augmenter=augmenter,
        evaluator=evaluator,
        precise_bn=precise_bn,
        state=state,
        teacher=teacher,
        freezing=freezing,
        rates=tuple(rates),
        course=course,
    )


def precise_statistics(recipe: Recipe, inputs: Inputs, engine: Engine) -> PreciseBatchNorm:
    """What makes running statistics from the images that a recipe trains on.

    Where images grow, of their last size, whatever the step: evaluation sees none smaller.
    """
    grown = replace(inputs, sizes=())
    augmenter = build_augmenter(recipe, len(inputs.outputs), engine.device, grown)

    def batches(recipe: Recipe, plan: BatchPlan) -> Iterator[MicroBatch]:
        return training_batches(recipe, inputs, plan, augmenter.view, engine.device)

    return PreciseBatchNorm(engine, recipe, augmenter, inputs.plan.timeline, batches)


def head_prior(recipe: Recipe, inputs: Inputs) -> Tensor | None:
    """The classifier's first bias [C] where the recipe asks for the training data's prior."""
    if recipe.model.init is None or not recipe.model.init.head_prior:
        return None
    by_sigmoids = {"bce", "focal_sigmoid"}  # losses that ask each class for itself
    counts = inputs.splits["train"].class_counts.tolist()
    return prior_bias(counts, sigmoids=str(recipe.loss.name) in by_sigmoids)


def class_counts(inputs: Inputs) -> ClassCounts | None:
    """The training data's classes and their samples; None of a stream, which has no index."""
    train = inputs.splits.get("train")
    return None if train is None else ClassCounts(train.classes, train.class_counts.tolist())


def probe(model: nn.Module, objective: Objective, recipe: Recipe, classes: int) -> None:
    """Raise UserError where a forward pass changes state that ranks cannot agree on."""
    count = min(2, recipe.micro_batch)
    shape = count, recipe.data.channels, *height_width(recipe.data.image_size)
    images = torch.linspace(-1, 1, math.prod(shape)).view(shape).repeat(recipe.views, 1, 1, 1)
    targets = images.new_full((count, classes), 1 / classes)
    if recipe.distill is not None:
        hint = recipe.distill.hint
        attention = targets.new_zeros((count, 0 if hint is None else hint.grid**2))
        targets = torch.cat([targets, targets.log(), attention], 1)
    check_state(model, lambda network, x: objective(network, x, targets), images)


def check_same_data(inputs: Inputs, engine: Engine) -> None:
    """Raise UserError where this rank opened other shards than rank 0. Collective.

    Copies on the disks of machines may differ, and an index may be replaced while ranks start.
    """
    hashes = {role: index.hash for role, index in inputs.splits.items()}
    theirs: dict[str, str] = engine.from_main(hashes)
    for role in theirs | hashes:
        here, expected = hashes.get(role, "none"), theirs.get(role, "none")
        if here != expected:
            place = inputs.splits[role].place if role in hashes else f"split {role}"
            raise UserError(
                f"{place} has index {here} here, rank 0 has {expected}; give every "
                "machine the same shards and index, then start again"
            )
