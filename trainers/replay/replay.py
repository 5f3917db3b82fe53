"""A step of a run again: the same loop, from a checkpoint, in one process, into nothing.

The steps are those of trainers/loop.py, as is all that they are made of; only what would write
(log, saver, watchdog) is another thing. So what a replay gives is what the run gives, and where
`reduction: exact` holds, the record's bits.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bigbatch.configs.errors import Changed, UserError
from bigbatch.configs.files import read_json
from bigbatch.configs.recovery import Corruption
from bigbatch.configs.rundir import RunDir
from bigbatch.data.batch import MicroBatch
from bigbatch.trainers.corruption.check import CorruptionCheck
from bigbatch.trainers.dynamics.record import SampleRecords
from bigbatch.trainers.job import Job, build_job
from bigbatch.trainers.ledger.lines import DIGESTS, digests_of
from bigbatch.trainers.ledger.record import LedgerWriter
from bigbatch.trainers.loop import train
from bigbatch.trainers.losses.build import Objective
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.monitoring.monitor import Monitor
from bigbatch.trainers.optim import trust_ratios
from bigbatch.trainers.recovery.checkpoint import check_fingerprint, load_checkpoint
from bigbatch.trainers.recovery.rollback import Rollback, StepFailed
from bigbatch.trainers.recovery.stored import STATE, list_checkpoints
from bigbatch.trainers.replay.past import Past, Record, find_past
from bigbatch.trainers.replay.saved import unlike_saved
from bigbatch.trainers.replay.stand_ins import (
    NoSaver,
    NoSignal,
    Notes,
    NoWatchdog,
    Replaying,
    WatchedEngine,
)

_FEW_IMAGES = 4096  # that this process decodes before others for it would have started
# Of a record, what follows from the step alone: averages start anew at each attempt, and
# grad_sq_micro is divided before ranks add it up.
COMPARED = ("loss", "grad_norm", "lr")
KEYS = "keys in the ledger"  # what a difference of the samples' digests is called


@dataclass(frozen=True)
class Difference:
    """A value of a step that came out other than recorded."""

    step: int
    name: str
    recorded: float | str | None
    recomputed: float | str | None

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.name} recorded {self.recorded}, recomputed {self.recomputed}"
        )


@dataclass(frozen=True)
class Replayed:
    """A step once more. Tensors are by parameter, or by name in the model, on the run's device."""

    past: Past
    record: Record  # loss, grad_norm, lr and the rest, as the loop logs them
    updated: bool  # it changed the weights
    gradient: dict[str, Tensor]  # the mean over all samples, before clipping
    norms: dict[str, float]  # of it, by parameter
    earlier: tuple[dict[str, float], ...]  # likewise, of the steps that were replayed before it
    before: dict[str, Tensor]  # the model's state, and ...
    after: dict[str, Tensor]  # ... after the step
    ratios: dict[str, float]  # trust ratios of LARS or LAMB
    compared: int  # values that are on record
    lines: int  # of the ledger, their digests among these values
    differences: tuple[Difference, ...]  # of the replayed steps, the oldest first
    line: Record  # of the ledger
    unlike: tuple[str, ...] | None  # of the state saved after it, what differs; None: none is there

    @property
    def checkpoint(self) -> bool | None:
        """Whether the state after it is the one saved then; None: none is there."""
        return None if self.unlike is None else not self.unlike

    @property
    def same(self) -> bool | None:
        """Whether all that is on record came out again, bit for bit; None: nothing is."""
        if self.differences or self.checkpoint is False:
            return False
        return True if self.compared or self.checkpoint else None


class Watch(Protocol):
    """What sees a step as it is made again: its micro-batches, and each call of the objective."""

    def micro_batch(self, batch: MicroBatch) -> MicroBatch: ...

    def objective(self, objective: Objective) -> Objective: ...


class Replay:
    """A run opened at the state that a replay starts from; `open_replay` makes one."""

    watch: Watch | None = None

    def __init__(self, past: Past, job: Job, engine: WatchedEngine, log: Notes) -> None:
        self.past, self.job, self.engine, self.log = past, job, engine, log
        self.statistics = StepStatistics(engine.module)
        splits = job.inputs.splits
        self._monitor = Monitor(log, engine, job.recipe, len(splits["val"].classes), [])

    def advance(self, stop: int) -> None:
        """Go on to the state after `stop` finished steps, each with the threads that it had."""
        state = self.job.state
        while state.step < stop:
            here = self.past.attempt(state.step + 1)
            until = state.step + 1
            while until < stop and self.past.attempt(until + 1) is here:
                until += 1
            threads = here.get("threads")
            if type(threads) is int and threads > 0:
                torch.set_num_threads(threads)
            self._train(until)

    def _train(self, stop: int) -> None:
        inputs = self.job.inputs
        job = replace(self.job, inputs=replace(inputs, plan=replace(inputs.plan, stop=stop)))
        watch = self.watch
        if watch is not None:
            job = replace(job, objective=watch.objective(job.objective))
        with closing(job.traced_batches(job.state.step, stop)) as found:
            batches = found if watch is None else map(watch.micro_batch, found)
            ledger = LedgerWriter(job, self.log)
            attempt = Replaying(
                job,
                self.log,
                self._monitor,
                self.statistics,
                NoSaver(),
                NoWatchdog(),
                NoSignal(),
                batches,
                ledger,
                SampleRecords(job, self.log),
                CorruptionCheck(job, self.log, ledger),
                past=self.past,
            )
            try:
                train(attempt)
            except (Rollback, StepFailed) as error:
                raise Changed(
                    f"{error}. That is so here alone: {self.past.run.name} went on from there. "
                    f"Replay that step, or start nearer to step {self.past.step} with --from"
                ) from None

    def take(self) -> Replayed:
        """The step itself."""
        past, state, engine = self.past, self.job.state, self.engine
        before = self.copied()
        engine.keeps = True
        self.advance(past.step)
        engine.keeps = False
        updated = not any(first <= past.step - 1 <= last for first, last in state.skipped_steps)
        record = self.log.trained[past.step]
        unlike = unlike_saved(past, state)
        updated = updated and None not in (record["loss"], record["grad_norm"])
        return Replayed(
            past,
            record,
            updated,
            engine.gradient,
            engine.by_parameter[-1],
            tuple(engine.by_parameter)[:-1],
            before,
            self.copied(),
            trust_ratios(engine.optimizer, engine.module) if updated else {},
            *self.compare(),
            self.log.lines[past.step],
            None if unlike is None else tuple(unlike),
        )

    def copied(self) -> dict[str, Tensor]:
        """The model's parameters and buffers as they are now."""
        state: dict[str, Tensor] = self.engine.module.state_dict()
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Parameters and buffers as they were."""
        self.engine.module.load_state_dict(tensors)

    def compare(self) -> tuple[int, int, tuple[Difference, ...]]:
        """What of the replayed steps is on record: how many values, how many lines of the ledger,
        and which of them came out other than recorded, those of the oldest step first."""
        compared, found = 0, []
        for step, record in sorted(self.past.records.items()):
            here = self.log.trained.get(step)
            if here is None:  # not yet
                continue
            pairs = [(name, record[name], here[name]) for name in COMPARED if name in record]
            by_layer = self.log.details.get((step, "gradients"), {}).get("norms", {})
            recorded = self.past.gradients.get(step, {}).get("norms", {})
            pairs += [
                (f"gradient of {n}", recorded[n], by_layer.get(n)) for n in recorded if by_layer
            ]
            compared += len(pairs)
            found += [Difference(step, *pair) for pair in pairs if pair[1] != pair[2]]
        lines = self._ledger()
        for step, digests in lines.items():
            here = self.log.lines[step]
            compared += len(DIGESTS)
            found += [
                Difference(step, f"{name} in the ledger", digests[name], here[name])
                for name in DIGESTS
                if digests[name] != here[name]
            ]
        return compared, len(lines), tuple(sorted(found, key=lambda difference: difference.step))

    def _ledger(self) -> dict[int, dict[str, str]]:
        """Digests on record of the steps that were replayed."""
        if self.past.undone or not self.log.lines:
            return {}
        lines = digests_of(self.past.run.ledger, min(self.log.lines), max(self.log.lines))
        return {step: digests for step, digests in lines.items() if step in self.log.lines}


@contextmanager
def open_replay(past: Past, on_step: Callable[[], object] = lambda: None) -> Iterator[Replay]:
    """A run at the state that `past` starts from; `on_step` is called after each step.

    Raises UserError where it cannot be, and Changed where its recipe, its data or the checkpoint
    are not those that it was made with.
    """
    threads = torch.get_num_threads()
    scratch = Path(tempfile.mkdtemp(prefix="bigbatch-replay-"))
    try:
        run = RunDir(scratch / past.run.name)
        run.path.mkdir()
        recipe = past.recipe
        full = recipe.determinism == "full"
        engine = WatchedEngine(recipe.precision, recipe.reduction, deterministic=full)
        job = build_job(run, recipe, engine, None)
        _fill(job, past)
        first = job.inputs.plan.timeline.first
        images = first(past.step) - first(past.start)
        data = recipe.data.model_copy(update={"workers": 0} if images <= _FEW_IMAGES else {})
        # What leaps is looked at here, not gone back from; a step is replayed once, not twice.
        recovery = recipe.recovery.model_copy(update={"spike": None, "corruption": Corruption()})
        log = recipe.log.model_copy(update={"ledger_every": 1, "samples": False})
        here = recipe.model_copy(update={"data": data, "recovery": recovery, "log": log})
        job = replace(job, recipe=here)
        notes = Notes(run, here, job.inputs.plan.total, job.inputs.epoch_samples, on_step)
        yield Replay(past, job, engine, notes)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(scratch, ignore_errors=True)


def _fill(job: Job, past: Past) -> None:
    """The state that the replay starts from, as `resume` and a rollback leave it."""
    state = job.state
    if past.checkpoint is not None:
        try:
            load_checkpoint(past.checkpoint, state)
        except OSError as error:
            raise UserError(
                f"{past.checkpoint} cannot be read any more: {error}; a run that goes on keeps "
                "the newest alone (checkpoint.keep), so ask again, or for a newer step"
            ) from None
    else:
        for path in list_checkpoints(past.run.checkpoints):
            if (content := read_json(path / STATE)) is not None:
                check_fingerprint(path, content.get("fingerprint", {}), state.fingerprint)
                break
    state.skipped_steps[:] = [list(steps) for steps in past.skipped]
    if past.refused:
        state.skipped_steps.append([past.step - 1, past.step - 1])
    state.evaluations[:] = [e for e in past.evaluations if e.step <= state.step]
    if job.course.costs is not None:
        known = [step for step in past.confusions if step <= state.step]
        job.course.costs.update(past.confusions[max(known)] if known else None)


def replay_step(
    run: RunDir, step: int, *, start: int | None = None, before_rollback: bool = False
) -> Replayed:
    """Step `step` of a run again, from `start` finished steps or the newest checkpoint before it.

    Nothing of the run is changed. Raises UserError where it cannot be (`find_past`).
    """
    past = find_past(run, step, start=start, before_rollback=before_rollback)
    with open_replay(past) as replay:
        replay.advance(step - 1)
        return replay.take()
