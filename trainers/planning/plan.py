"""How a recipe's durations fall into steps. Free of torch: preflight uses it too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from bigbatch.configs.batch import ByNoise, PostLocal
from bigbatch.configs.errors import UserError
from bigbatch.configs.schema import Recipe
from bigbatch.configs.timeline import Crossings, Timeline, due
from bigbatch.trainers.planning.averaging import Averaging, plan_average
from bigbatch.trainers.planning.probes import Probes, plan_probes
from bigbatch.trainers.planning.schedules import cycle_ends

Every = int | Crossings  # so many steps, or where the batch changes, so many samples


@dataclass(frozen=True)
class Plan:
    """Which step does what; every number is a count of finished steps."""

    total: int  # steps that the recipe asks for; schedules run over these
    stop: int  # where this start of the run ends, at most `total`
    timeline: Timeline  # which samples each step takes
    micro_batch: int
    evaluate_every: Every
    save_every: Every
    snapshots: frozenset[int]
    keep_every: Every | None  # checkpoints at multiples of this stay for good
    average: Averaging | None  # which weights enter the run's average, if it keeps one
    probes: Probes  # which evaluations look more closely
    weights_from: int = 0  # class weights of the loss count from here on
    may_stop: bool = False  # earlier, going back to the best evaluation: so each one is saved
    units: int = 0  # of the timeline: those of the whole run, which schedules run over
    decide_every: Every | None = None  # whether the batch grows
    decided: int = 0  # samples: up to here that is decided

    def micro_batches(self, step: int) -> int:
        """Those of the step after `step` finished ones, over all ranks."""
        return self.timeline.batch(step) // self.micro_batch

    def decides(self, step: int) -> bool:
        """Whether the batch of the step after `step` finished ones is to be decided on."""
        if self.decide_every is None or step >= self.total:
            return False
        return due(self.decide_every, step) and self.timeline.first(step) > self.decided

    @property
    def first_decision(self) -> int:
        """The first step that is not decided yet, of a run that decides."""
        return next(
            step for step in range(1, self.total + 1) if self.decides(step) or step == self.total
        )

    def evaluates(self, step: int) -> bool:
        return due(self.evaluate_every, step) or step == self.total

    def saves(self, step: int) -> bool:
        return self.saves_wherever_it_stops(step) or step == self.stop

    def saves_wherever_it_stops(self, step: int) -> bool:
        """Whether a run has a checkpoint of this step however it is interrupted."""
        kept = self.keep_every is not None and due(self.keep_every, step)
        best = self.may_stop and self.evaluates(step)
        return due(self.save_every, step) or kept or best

    def evaluations(self) -> int:
        """How many steps of the whole run `evaluates` names."""
        return _count((self.evaluate_every,), self.total)

    def checkpoints(self) -> int:
        """How many steps `saves` names in a run that no start ends early."""
        every = [self.save_every]
        every += [] if self.keep_every is None else [self.keep_every]
        every += [self.evaluate_every] if self.may_stop else []
        return _count(every, self.total)

    def kept(self) -> int:
        """How many of these stay for good."""
        if self.keep_every is None:
            return 0
        if isinstance(self.keep_every, int):
            return self.total // self.keep_every
        return len(self.keep_every.steps(self.total))


def _count(every: Sequence[Every], total: int) -> int:
    """How many numbers from 1 to `total` are due by one of these, or are `total` itself."""
    numbers = [period for period in every if isinstance(period, int)]
    if len(numbers) == len(every):
        return _multiples(numbers, total)
    crossed = {s for period in every if not isinstance(period, int) for s in period.steps(total)}
    beside = sum(all(step % n for n in numbers) for step in crossed - {total})
    return beside + _multiples(numbers, total)


def _multiples(periods: Sequence[int], total: int) -> int:
    """How many numbers from 1 to `total` a period divides, or are `total` itself.

    By inclusion and exclusion: a run may have a hundred million steps.
    """
    signs = ((n, (-1) ** (n + 1)) for n in range(1, len(periods) + 1))
    count = sum(
        sign * (total // math.lcm(*some)) for n, sign in signs for some in combinations(periods, n)
    )
    return count + all(total % period for period in periods)


def make_plan(recipe: Recipe, epoch_samples: int, stop_at: int | None = None) -> Plan:
    """The plan of a run over an order policy with `epoch_samples` samples in an epoch.

    Raises UserError where cycles, an average or deferred class weights do not fit into the run.
    """
    line = recipe.timeline(epoch_samples)
    total = line.steps(recipe.duration)
    ends = snapshot_steps(recipe, line, total)
    keep = recipe.checkpoint.keep_every
    evaluate_every = line.every(recipe.evaluate.every)
    later = getattr(recipe.loss, "class_weights_from", None)
    weights_from = 0 if later is None else line.steps(later)
    if weights_from >= total:
        raise UserError(
            f"loss.class_weights_from = {later} is step {weights_from}, and the run has {total}: "
            "class weights would never count; let them begin earlier, or drop them"
        )
    batch, decide_every, decided = recipe.global_batch, None, 0
    if isinstance(batch, ByNoise) and line.batches[-1] < line.largest:
        decide_every = line.every(batch.every)
        decided = max((samples for samples, _ in batch.decided), default=0)
    # The step that ends an open run may be a larger one; its schedule is of the samples asked for.
    units = recipe.duration.steps(line.unit, epoch_samples) if line.is_open else line.units(total)
    return Plan(
        total=total,
        stop=min(total, stop_at or total),
        timeline=line,
        micro_batch=recipe.micro_batch,
        evaluate_every=evaluate_every,
        save_every=line.every(recipe.checkpoint.every),
        snapshots=frozenset(ends or [total]),
        keep_every=None if keep is None else line.every(keep),
        average=plan_average(recipe.average, total, line, ends),
        probes=_probes(recipe, total, line, evaluate_every) if recipe.log.diagnosis else Probes(),
        weights_from=weights_from,
        may_stop=recipe.regularise.early_stop is not None,
        units=units,
        decide_every=decide_every,
        decided=decided,
    )


def snapshot_steps(recipe: Recipe, line: Timeline, total: int) -> list[int]:
    """Finished steps at which cycles of the schedule end; [] for one without cycles.

    Raises UserError where a cycle would hold no step.
    """
    ends = [
        line.reaching(end * line.unit) for end in cycle_ends(recipe.schedule, line.units(total))
    ]
    if len(set(ends)) < len(ends):
        raise UserError(
            f"schedule.cycles = {len(ends)} for a run of {total} steps, of up to "
            f"{line.largest} samples: each cycle needs at least one step; use fewer cycles, a "
            "longer duration, or smaller batches"
        )
    return ends


def _probes(recipe: Recipe, total: int, line: Timeline, evaluate_every: Every) -> Probes:
    if line.is_open:
        # By samples alone, so that no decision moves a probe that lies behind it.
        if isinstance(evaluate_every, int):
            return Probes(first_gradients=True)
        period, unit = evaluate_every.period, line.unit
        samples = round(recipe.duration.samples(unit, line.epoch_samples))
        marks = [*range(period, samples // unit + 1, period), -(-samples // unit)]
        return plan_probes([line.reaching(mark * unit) for mark in marks], total, samples)
    if isinstance(evaluate_every, int):
        evaluations: Sequence[int] = range(evaluate_every, total + evaluate_every, evaluate_every)
    else:
        evaluations = list(dict.fromkeys([*evaluate_every.steps(total), total]))
    return plan_probes(evaluations, total, line.first(total))


def largest_world(recipe: Recipe) -> int:
    """How many ranks can run a recipe.

    Ranks without a micro-batch in a step take part in its sums alone, which DDP's gradients can be
    and those of pieces cannot: DeepSpeed and FSDP2 exchange them while a rank goes backward.
    """
    if isinstance(recipe.global_batch, PostLocal):
        return recipe.global_batch.workers
    if recipe.backend == "ddp":
        return recipe.micro_batches
    return recipe.smallest_batch // recipe.micro_batch


def fits(recipe: Recipe, world: int) -> bool:
    """Whether so many ranks can run a recipe: none without a micro-batch, and of workers that
    train apart each as many."""
    if isinstance(recipe.global_batch, PostLocal):
        return recipe.global_batch.workers % world == 0
    return world <= largest_world(recipe)


def check_world(recipe: Recipe, world: int) -> None:
    """Raise UserError, with the remedy, where so many ranks cannot run a recipe."""
    if fits(recipe, world):
        return
    if isinstance(recipe.global_batch, PostLocal):
        workers = recipe.global_batch.workers
        numbers = ", ".join(str(n) for n in range(1, workers + 1) if fits(recipe, n))
        raise UserError(
            f"{world} ranks for the {workers} workers of global_batch post_local: each rank trains "
            f"whole workers, as many as the others; use one of {numbers} ranks"
        )
    most, changes = largest_world(recipe), not isinstance(recipe.global_batch, int)
    batch = most * recipe.micro_batch
    if changes and most < recipe.micro_batches:
        raise UserError(
            f"{world} ranks, but the smallest steps have only {most} micro-batches (global_batch "
            f"{batch} / micro_batch {recipe.micro_batch}), and with backend {recipe.backend} every "
            f"rank needs one in each step; use at most {most} ranks, or backend=ddp, which lets "
            "ranks wait"
        )
    raise UserError(
        f"{world} ranks, but {'the largest step has' if changes else 'a step has'} only {most} "
        f"micro-batches (global_batch {batch} / micro_batch {recipe.micro_batch}); use at "
        f"most {most} ranks, or lower micro_batch to {max(1, batch // world)} or less"
    )
