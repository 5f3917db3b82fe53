"""How a recipe's durations fall into steps. Free of torch: preflight uses it too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from bigbatch.configs.errors import UserError
from bigbatch.configs.schema import Recipe
from bigbatch.trainers.planning.averaging import Averaging, plan_average
from bigbatch.trainers.planning.probes import Probes, plan_probes
from bigbatch.trainers.planning.schedules import cycle_ends


@dataclass(frozen=True)
class Plan:
    """Which step does what; every number is a count of finished steps."""

    total: int  # steps that the recipe asks for; schedules run over these
    stop: int  # where this start of the run ends, at most `total`
    micro_batches: int
    evaluate_every: int
    save_every: int
    snapshots: frozenset[int]
    keep_every: int | None  # checkpoints at multiples of this stay for good
    average: Averaging | None  # which weights enter the run's average, if it keeps one
    probes: Probes  # which evaluations look more closely
    weights_from: int = 0  # class weights of the loss count from here on
    may_stop: bool = False  # earlier, going back to the best evaluation: so each one is saved

    def evaluates(self, step: int) -> bool:
        return step % self.evaluate_every == 0 or step == self.total

    def saves(self, step: int) -> bool:
        kept = self.keep_every is not None and step % self.keep_every == 0
        best = self.may_stop and self.evaluates(step)
        return step % self.save_every == 0 or kept or best or step == self.stop

    def evaluations(self) -> int:
        """How many steps of the whole run `evaluates` names."""
        return _multiples((self.evaluate_every,), self.total)

    def checkpoints(self) -> int:
        """How many steps `saves` names in a run that no start ends early."""
        every = [self.save_every]
        every += [] if self.keep_every is None else [self.keep_every]
        every += [self.evaluate_every] if self.may_stop else []
        return _multiples(every, self.total)


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
    batch = recipe.global_batch
    total = recipe.duration.steps(batch, epoch_samples)
    ends = cycle_ends(recipe.schedule, total)
    keep = recipe.checkpoint.keep_every
    evaluate_every = recipe.evaluate.every.steps(batch, epoch_samples)
    look = recipe.log.diagnosis
    later = getattr(recipe.loss, "class_weights_from", None)
    weights_from = 0 if later is None else later.steps(batch, epoch_samples)
    if weights_from >= total:
        raise UserError(
            f"loss.class_weights_from = {later} is step {weights_from}, and the run has {total}: "
            "class weights would never count; let them begin earlier, or drop them"
        )
    return Plan(
        total=total,
        stop=min(total, stop_at or total),
        micro_batches=recipe.micro_batches,
        evaluate_every=evaluate_every,
        save_every=recipe.checkpoint.every.steps(batch, epoch_samples),
        snapshots=frozenset(ends or [total]),
        keep_every=None if keep is None else keep.steps(batch, epoch_samples),
        average=plan_average(recipe.average, total, batch, epoch_samples, ends),
        probes=plan_probes(total, batch, evaluate_every) if look else Probes(),
        weights_from=weights_from,
        may_stop=recipe.regularise.early_stop is not None,
    )


def check_world(recipe: Recipe, world: int) -> None:
    """Raise UserError where more ranks would run than there are micro-batches in a step."""
    if world > recipe.micro_batches:
        raise UserError(
            f"{world} ranks, but a step has only {recipe.micro_batches} micro-batches "
            f"(global_batch {recipe.global_batch} / micro_batch {recipe.micro_batch}); use at "
            f"most {recipe.micro_batches} ranks, or lower micro_batch to "
            f"{max(1, recipe.global_batch // world)} or less"
        )
