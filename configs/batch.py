"""The samples of a step, as a recipe writes them: a number, or how it changes over the run.

configs/timeline.py says which samples a step takes then. Sources: Smith et al. 2018
(arXiv:1711.00489) and Devarakonda et al. 2017 (arXiv:1712.02029), batches that grow where the rate
would fall; McCandlish et al. 2018 (arXiv:1812.06162), why the noise asks for larger ones later.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, PrivateAttr, Tag, model_validator

from bigbatch.configs.batch_rules import Rules, without_base
from bigbatch.configs.durations import Period
from bigbatch.configs.errors import UserError
from bigbatch.configs.part import Count, Positive, StrictModel
from bigbatch.configs.stream import lengths
from bigbatch.configs.timeline import Timeline

_MOST_CHANGES = 100_000


class BatchPiece(StrictModel):
    """A batch, and how far into the run it goes; the last one goes to the end."""

    batch: Count = Field(description="samples in one optimizer step")
    until: Period | None = Field(
        None, description="of the run, in epochs or samples; the last piece has none"
    )


class Stages(Rules):
    """One batch after another."""

    name: Literal["stages"]
    pieces: list[BatchPiece] = Field(min_length=2, description="in order")

    @property
    def sizes(self) -> list[int]:
        return [piece.batch for piece in self.pieces]

    def changes(self, epoch_samples: int) -> Iterator[tuple[float, int]]:
        for before, piece in pairwise(self.pieces):
            assert before.until is not None
            yield before.until.samples(1, epoch_samples), piece.batch

    @model_validator(mode="after")
    def _check(self) -> Self:
        for i, piece in enumerate(self.pieces, 1):
            if (piece.until is None) != (i == len(self.pieces)):
                raise ValueError(
                    f"piece {i} of {len(self.pieces)}: every piece but the last says until when "
                    "it goes, the last one goes to the end of the run"
                )
        for before, after in pairwise(self.pieces):
            if before.batch == after.batch:
                raise ValueError(
                    f"two pieces of {before.batch} after each other change nothing; make them one"
                )
        ends = [piece.until for piece in self.pieces if piece.until is not None]
        for i, (a, b) in enumerate(pairwise(ends), 1):
            if a.unit == b.unit and a.value >= b.value:
                raise ValueError(
                    f"piece {i + 1} goes until {b}, no further than the one before it ({a}); "
                    "`until` counts from the start of the run, so let it rise"
                )
        return self


class _Doubled(Rules):
    """`start`, and twice that, and so on up to `most`."""

    start: Count = Field(description="samples in the run's first step")
    most: Count = Field(description="samples in a step at last: start times a power of 2")

    @property
    def sizes(self) -> list[int]:
        return [self.start << k for k in range((self.most // self.start).bit_length())]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.most <= self.start or self.sizes[-1] != self.most:
            raise ValueError(
                f"most {self.most} is not {self.start} (start) doubled some times; write such as "
                f"{self.start * 2 ** max(1, round(math.log2(self.most / self.start)))}"
            )
        return self


class Doubling(_Doubled):
    """Twice the batch after every `every`, up to `most`."""

    name: Literal["doubling"]
    every: Period = Field(description="from one doubling to the next, in epochs or samples")

    def changes(self, epoch_samples: int) -> Iterator[tuple[float, int]]:
        every = self.every.samples(1, epoch_samples)
        return ((k * every, batch) for k, batch in enumerate(self.sizes[1:], 1))


class ByNoise(_Doubled):
    """Twice the batch, up to `most`, where the gradients that were measured ask for it.

    A run decides after every `every`, and writes it down before it takes effect: from then on that
    stands, whoever goes on with the run. McCandlish et al. 2018 (arXiv:1812.06162), section 2.2.
    """

    name: Literal["noise_scale"]
    every: Period = Field(description="from one decision to the next, in epochs or samples")
    target: Positive = Field(
        1.0,
        description="the batch doubles where this times the gradient noise scale reaches twice "
        "the batch; smaller: later",
    )
    # (samples, batch): what a run has decided at which position, rising. Its recipe says none of
    # it: events.jsonl does, and `following` puts it here.
    _decided: tuple[tuple[int, int], ...] = PrivateAttr(())

    @property
    def decided(self) -> tuple[tuple[int, int], ...]:
        return self._decided

    def following(self, decided: Iterable[tuple[int, int]]) -> "ByNoise":
        """The same once these (samples, batch) are decided; what it cannot decide is left out."""
        found, sizes = self.model_copy(), self.sizes
        found._decided = tuple(d for d in sorted(decided) if d[0] > 0 and d[1] in sizes)
        return found

    def fastest(self, epoch_samples: int) -> "ByNoise":
        """The same where each decision doubles the batch."""
        every = self.every.samples(1, epoch_samples)
        return self.following((math.ceil(k * every), b) for k, b in enumerate(self.sizes[1:], 1))

    def changes(self, epoch_samples: int) -> Iterator[tuple[float, int]]:
        now = self.start
        for samples, batch in self._decided:
            if batch != now:
                yield samples, batch
            now = batch


class LinearGrowth(Rules):
    """From `start` to `end` by equal parts of the samples seen, in whole micro-batches."""

    name: Literal["linear"]
    start: Count = Field(description="samples in the run's first step")
    end: Count = Field(description="samples in a step from `until` on")
    until: Period = Field(description="of the run, in epochs or samples")
    by: Count = Field(
        description="samples by which a step grows at a time: micro_batch, or a multiple of it"
    )

    @property
    def sizes(self) -> list[int]:
        return list(range(self.start, self.end + 1, self.by))

    def changes(self, epoch_samples: int) -> Iterator[tuple[float, int]]:
        until, parts = self.until.samples(1, epoch_samples), len(self.sizes) - 1
        return ((k * until / parts, batch) for k, batch in enumerate(self.sizes[1:], 1))

    @model_validator(mode="after")
    def _check(self) -> Self:
        grows = self.end - self.start
        if grows <= 0 or grows % self.by or grows // self.by > _MOST_CHANGES:
            raise ValueError(
                f"from start {self.start} to end {self.end} by {self.by} at a time is no whole "
                f"number of parts, from 1 to {_MOST_CHANGES:,}; change one of them"
            )
        return self


class PostLocal(Rules):
    """Post-local SGD: from `start` on a step is a round, in which workers train apart.

    Each makes `every` updates of its own, of its share of `batch`, and then their weights and
    momenta are averaged: Lin et al. 2018 (arXiv:1808.07217); the momenta, too: Yu et al. 2019
    (arXiv:1905.03817).
    """

    name: Literal["post_local"]
    batch: Count = Field(
        description="samples in an update: of the run up to `start`, of all workers together behind"
    )
    workers: Annotated[int, Field(ge=2)] = Field(description="how many train apart in a round")
    every: Annotated[int, Field(ge=2, le=10_000)] = Field(
        description="updates of a worker from one average to the next"
    )
    start: Period = Field(description="of the run, in epochs or samples: rounds begin here")

    @property
    def sizes(self) -> list[int]:
        return [self.batch, self.batch * self.every]

    def changes(self, epoch_samples: int) -> Iterator[tuple[float, int]]:
        yield self.start.samples(1, epoch_samples), self.sizes[1]

    def batch_norm_power(self, batch: int) -> float:
        return batch / self.batch  # running statistics move as in so many steps

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch % self.workers:
            raise ValueError(
                f"batch {self.batch} is no equal share for each of {self.workers} workers; choose "
                "a batch that workers divides"
            )
        if {self.lr, self.batch_norm, self.betas, self.weight_decay} != {"none"}:
            raise ValueError(
                "each update is one of `batch` samples, before and in rounds: lr, batch_norm, "
                "betas and weight_decay have nothing to change; leave them out"
            )
        return self


Changing = Annotated[
    Stages | Doubling | LinearGrowth | ByNoise | PostLocal, Field(discriminator="name")
]
NUMBER, CHANGING = "~number", "~changing"  # tags of the branches, which no reader sees


def _branch(value: Any) -> str:
    return CHANGING if isinstance(value, dict | Rules) else NUMBER


GlobalBatch = Annotated[
    Annotated[Count, Tag(NUMBER)] | Annotated[Changing, Tag(CHANGING)], Discriminator(_branch)
]


def sizes(batch: "int | Rules") -> list[int]:
    """The samples of a step, as they follow each other."""
    return [batch] if isinstance(batch, int) else batch.sizes


def timeline(batch: "int | Rules", epoch_samples: int) -> Timeline:
    """Which samples each step takes, in epochs of so many. UserError where a piece has no step."""
    if isinstance(batch, int):
        return Timeline.constant(batch, epoch_samples)
    if isinstance(batch, ByNoise):
        if batch.every.samples(1, epoch_samples) < batch.most:
            raise UserError(
                f"global_batch.every = {batch.every}: in epochs of {epoch_samples:,} samples that "
                f"is less than a step of {batch.most:,} (most) has; let `every` be longer"
            )
        changes = batch.changes(epoch_samples)
        return Timeline.changing(batch.first, changes, epoch_samples, tuple(batch.sizes))
    found = Timeline.changing(batch.first, batch.changes(epoch_samples), epoch_samples)
    if isinstance(batch, Stages) and len(found.batches) < len(batch.pieces):
        ends = ", ".join(f"{piece.batch} until {piece.until}" for piece in batch.pieces[:-1])
        raise UserError(
            f"global_batch.pieces: {ends}: in epochs of {epoch_samples:,} samples one of them "
            "holds no step; let `until` rise further from one to the next"
        )
    return found


def refusals(recipe: Any) -> Iterator[str]:
    """Which batches no micro-batches make, and what a changing one cannot stand beside."""
    micro, batch = recipe.micro_batch, recipe.global_batch
    odd = [size for size in sizes(batch) if size % micro]
    if odd and isinstance(batch, int):
        yield (
            f"global_batch {batch} is not a multiple of micro_batch {micro}; choose a micro_batch "
            "that divides it"
        )
    elif odd:
        yield (
            f"global_batch has steps of {odd[0]}, which is not a multiple of micro_batch {micro}; "
            "choose a micro_batch that divides all of its batches, or other batches"
        )
    if isinstance(batch, int):
        return
    for place, length in lengths(batch, "global_batch"):
        if length.unit == "steps":
            yield (
                f"{place} = {length}: the batch is a function of the samples seen; give it in "
                "epochs or samples"
            )
    for key, part in (
        ("schedule", recipe.schedule),
        ("optimizer.momentum_schedule", getattr(recipe.optimizer, "momentum_schedule", None)),
    ):
        for place, length in lengths(part, key):
            if length.unit == "steps" and length.value:
                yield (
                    f"{place} = {length}: where global_batch changes, rates go by the samples "
                    "seen, and so many steps are no fixed number of them; give it in epochs or "
                    "samples"
                )
    yield from without_base(batch, recipe.optimizer)
    if isinstance(batch, ByNoise):
        yield from _needs_steps_ahead(batch, recipe)
    if isinstance(batch, PostLocal):
        yield from _trains_apart(batch, recipe)
    if recipe.optimizer.name == "lbfgs":
        yield (
            "optimizer lbfgs compares gradients of one step with those of the next, and another "
            "batch makes another function; set global_batch to a number"
        )


def _trains_apart(batch: PostLocal, recipe: Any) -> Iterator[str]:
    """What workers with weights of their own cannot have, or not yet."""
    own, micro = batch.batch // batch.workers, recipe.micro_batch
    if own % micro:
        yield (
            f"global_batch.batch {batch.batch} for {batch.workers} workers is {own} for each, "
            f"which is not a multiple of micro_batch {micro}; choose a micro_batch that divides it"
        )
    gradual = getattr(recipe.transfer, "name", None) == "gradual"
    for said, key, why, instead in (
        (
            recipe.reduction != "exact",
            f"reduction {recipe.reduction}",
            "exchanges gradients in each backward pass",
            "set it to exact",
        ),
        (
            recipe.optimizer.name != "sgd",
            f"optimizer {recipe.optimizer.name}",
            "has state whose average over workers means nothing known",
            "take sgd",
        ),
        (recipe.precision == "fp16", "precision fp16", "has one loss scale for all", "take bf16"),
        (
            recipe.regularise.sharpness is not None,
            "regularise.sharpness",
            "moves the weights between passes",
            "leave it out",
        ),
        (recipe.model.compile, "model.compile", "keeps one set of weights", "set it to false"),
        (gradual, "transfer gradual", "begins between two updates", "choose another transfer"),
        (recipe.loss.name == "center", "loss center", "learns beside them", "choose another loss"),
        (
            recipe.recovery.corruption.recompute_every is not None,
            "recovery.corruption.recompute_every",
            "computes micro-batches of another worker",
            "set it to null",
        ),
    ):
        if said:
            yield (f"global_batch post_local lets workers train apart, and {key} {why}; {instead}")


def _needs_steps_ahead(batch: ByNoise, recipe: Any) -> Iterator[str]:
    """What must know the steps to come, where only the samples are known."""
    known = "a batch that noise_scale decides on leaves open which step that is"
    if recipe.duration.unit == "steps":
        yield f"duration = {recipe.duration}: {known}; give it in epochs or samples"
    if batch.start < 2 * recipe.micro_batch:
        yield (
            f"global_batch.start {batch.start} is one micro-batch of {recipe.micro_batch}: the "
            "noise scale compares at least two; lower micro_batch, or raise start"
        )
    if recipe.data.stream is not None:
        yield (
            "global_batch noise_scale needs indexed shards: what a stream's steps hold depends on "
            "ranks, and so would decisions; index the tars and set data.path"
        )
    distill, loss = recipe.distill, recipe.loss
    for said, key, instead in (
        (recipe.schedule.name == "cycles", "schedule cycles", "choose another schedule"),
        (recipe.data.progressive is not None, "data.progressive", "leave it out"),
        (
            getattr(recipe.transfer, "name", None) == "gradual",
            "transfer gradual",
            "choose another transfer",
        ),
        (
            getattr(getattr(loss, "class_weights_from", None), "value", 0) > 0,
            "loss.class_weights_from",
            "leave it out",
        ),
        (
            distill is not None and distill.cache_gb > 0,
            "distill.cache_gb",
            "set it to 0",
        ),
    ):
        if said:
            yield f"{key} begins at a step that is known ahead, and {known}; {instead}"
