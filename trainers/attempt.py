"""One attempt of a run: from a checkpoint to the run's end, a signal, or a step gone wrong."""

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial

from torch import nn

from bigbatch.configs.batch import ByNoise
from bigbatch.configs.decisions import KIND
from bigbatch.configs.files import finite
from bigbatch.configs.judged import judged_by
from bigbatch.data.batch import MicroBatch
from bigbatch.trainers.advice.noise_scale import asks_for, noise_scale
from bigbatch.trainers.corruption.check import CorruptionCheck
from bigbatch.trainers.dynamics.record import SampleRecords
from bigbatch.trainers.ensemble.members import save_snapshot
from bigbatch.trainers.evaluation.metrics import confusion
from bigbatch.trainers.evaluation.outcomes import Outcomes
from bigbatch.trainers.evaluation.probe import Probe
from bigbatch.trainers.evaluation.targets import Numbers
from bigbatch.trainers.job import Job
from bigbatch.trainers.ledger.record import LedgerWriter
from bigbatch.trainers.losses.confusion import Counts
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.monitoring.log import Log
from bigbatch.trainers.monitoring.monitor import Monitor
from bigbatch.trainers.planning.plateau import Evaluation
from bigbatch.trainers.recovery.heartbeat import Heartbeat
from bigbatch.trainers.recovery.saving import Saver
from bigbatch.trainers.recovery.signals import StopFlag
from bigbatch.trainers.recovery.stored import Retention
from bigbatch.trainers.recovery.watchdog import Watchdog

_MOST_TARGETS = 256  # of whose scores each evaluation keeps a record


class Ending(Enum):
    """Why the loop has ended."""

    DONE = "done"  # it has come to the plan's stop, or an early one
    LEFT = "left"  # after a signal
    GROWN = "grown"  # the batch doubles: another plan holds from here on


@dataclass(frozen=True)
class Attempt:
    """What the loop works with: the job, and all that lives as long as this attempt."""

    job: Job
    log: Log
    monitor: Monitor
    statistics: StepStatistics
    saver: Saver
    watchdog: Watchdog
    stop: StopFlag
    batches: Iterator[MicroBatch]  # this rank's, from the state's step on
    ledger: LedgerWriter
    samples: SampleRecords
    corruption: CorruptionCheck
    probe: Probe | None = None

    def evaluate(self, *, snapshot: bool = False) -> dict[str, float]:
        """Scores of the validation split, the same on every rank. Collective.

        With `snapshot` the weights are kept, with these scores and the statistics that gave them.
        Where the plan has one, a probe is recorded with them.
        """
        job, state = self.job, self.job.state
        val = job.inputs.splits["val"]
        with self._evaluated_model(snapshot=snapshot) as model:
            found = job.evaluator.outcomes(model, val)
            scores: dict[str, float] = job.engine.from_main(
                None if found is None else found.scores()
            )
            if self.probe is not None and state.step in job.inputs.plan.probes.steps:
                self.log.detail(state.step, "probe", **self.probe.look(model, found))
            if snapshot:
                number = sorted(job.inputs.plan.snapshots).index(state.step) + 1
                keep = partial(save_snapshot, job.run.snapshots, number, state.step)
                # A full disk is then every rank's error, and none loses another one.
                job.engine.on_main(lambda: str(keep(model, scores, state.info)))
        if isinstance(found, Numbers) and 1 < found.true.shape[1] <= _MOST_TARGETS:
            self.log.detail(state.step, "targets", **found.by_target())
        if job.course.costs is not None:
            table = None
            if isinstance(found, Outcomes):
                table = confusion(found.label, found.predicted, len(val.classes)).tolist()
            counts: Counts = job.engine.from_main(table)
            self.log.detail(state.step, "confusion", matrix=counts)  # before it takes effect
            job.course.costs.update(counts)
        state.evaluations.append(Evaluation(state.step, scores))
        return scores

    def grows(self, step: int) -> bool:
        """Decide whether the batch doubles from the step after `step` finished ones on. Collective.

        The averages are the same on every rank. What is decided is on the disk before any step
        follows from it.
        """
        job, state = self.job, self.job.state
        rules, line = job.recipe.global_batch, job.inputs.plan.timeline
        assert isinstance(rules, ByNoise)
        now, samples = line.batch(step), line.first(step)
        grows = asks_for(2 * now, rules.target, *state.noise)
        batch = 2 * now if grows else now
        values = finite({"noise_scale": noise_scale(*state.noise)})
        self.log.event(KIND, step=step, samples=samples, global_batch=batch, **values)
        job.engine.on_main(self.log.sync)
        state.decided.append((samples, batch))
        return grows

    @contextmanager
    def _evaluated_model(self, *, snapshot: bool) -> Iterator[nn.Module]:
        """A plain model with whole weights, and statistics of its own where the recipe says so;
        the state keeps those for the checkpoint of this step. Training's own stay as they are."""
        job, state = self.job, self.job.state
        with job.engine.full_model() as model:
            if not job.recipe.evaluate.is_precise(state.step):
                yield model
                return
            if job.freezing is not None:
                job.freezing.keep_statistics(model, state.step)
            with job.precise_bn.applied(model, state.step, snapshot=snapshot) as statistics:
                state.evaluated = (state.step, statistics)
                yield model


@contextmanager
def open_attempt(
    job: Job,
    log: Log,
    monitor: Monitor,
    statistics: StepStatistics,
    stop: StopFlag,
    heartbeat: Heartbeat,
) -> Iterator[Attempt]:
    """An attempt that goes on from `job.state`. Collective."""
    run, recipe, engine, plan = job.run, job.recipe, job.engine, job.inputs.plan
    keep = recipe.checkpoint
    back = recipe.recovery.skip_steps if recipe.recovery.max_rollbacks else 0
    retention = Retention(keep.keep, keep.keep_best, plan.keep_every, back, judged_by(recipe))
    name = engine.from_main(f"{time.time_ns()}-{os.getpid()}")
    with (
        # Last to end: its wait for a slow disk, after an error, is no step that hangs.
        Saver(run.checkpoints, engine, log, retention) as saver,
        Watchdog(run, heartbeat, engine.world, name, recipe.recovery.stall_s) as watchdog,
        closing(job.traced_batches(job.state.step, plan.stop)) as batches,
    ):
        if recipe.recovery.max_rollbacks and job.state.step == 0:
            saver.save(job.state)  # there is always something to go back to
        ledger, samples = LedgerWriter(job, log), SampleRecords(job, log)
        probe = None
        if images := plan.probes.images:
            probe = Probe(engine, job.evaluator, job.inputs.splits, images, recipe.seed)
        yield Attempt(
            job=job,
            log=log,
            monitor=monitor,
            statistics=statistics,
            saver=saver,
            watchdog=watchdog,
            stop=stop,
            batches=batches,
            ledger=ledger,
            samples=samples,
            corruption=CorruptionCheck(job, log, ledger),
            probe=probe,
        )
