"""A run on this rank: one attempt after another, until one of them ends it."""

import gc
import os
import socket
import sys
from enum import Enum

import torch

from bigbatch.configs.batch import ByNoise
from bigbatch.configs.judged import judged_by
from bigbatch.configs.notices import notice
from bigbatch.trainers.attempt import Ending, open_attempt
from bigbatch.trainers.finish import finish
from bigbatch.trainers.job import Job
from bigbatch.trainers.loop import train
from bigbatch.trainers.losses.confusion import read_confusion
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.monitoring.log import Log, open_log
from bigbatch.trainers.monitoring.monitor import Monitor
from bigbatch.trainers.monitoring.stage import stage
from bigbatch.trainers.planning.early_stop import stops
from bigbatch.trainers.planning.environment import recorded_variables, said_variables
from bigbatch.trainers.planning.swap import unfinished
from bigbatch.trainers.recovery.heartbeat import Heartbeat
from bigbatch.trainers.recovery.resume import agreed_decisions, resume
from bigbatch.trainers.recovery.rollback import Rollback, StepFailed
from bigbatch.trainers.recovery.signals import SAVED, StopFlag, agent_pid


def work(job: Job, stop: StopFlag, heartbeat: Heartbeat) -> int:
    """Train, from wherever the run directory says, until no rollback asks for another try and no
    batch that has grown for another plan."""
    # What is there by now stays: the collector, off since the start (worker.py), need not look
    # through a million objects of libraries again.
    gc.freeze()
    gc.enable()
    statistics = StepStatistics(job.engine.module)
    status: int | Again = Again.FROM_CHECKPOINT
    while isinstance(status, Again):
        status = attempt(job, stop, heartbeat, statistics, status)
    return status


class Again(Enum):
    """From where the next attempt goes on."""

    FROM_CHECKPOINT = "from checkpoint"  # the newest
    FROM_HERE = "from here"  # the state as it is, under another plan


def attempt(
    job: Job,
    stop: StopFlag,
    heartbeat: Heartbeat,
    statistics: StepStatistics,
    start: Again = Again.FROM_CHECKPOINT,
) -> int | Again:
    """Go on; the exit status, or from where to go on once more."""
    run, engine, state = job.run, job.engine, job.state
    corrupt: list[str] = []
    if start is Again.FROM_CHECKPOINT:
        corrupt = resume(run, engine, state, job.recipe.log.every)
    if isinstance(job.recipe.global_batch, ByNoise):
        job = job.following(agreed_decisions(run, engine, state))
    recipe, plan = job.recipe, job.inputs.plan
    if job.course.costs is not None:
        seen = engine.on_main(lambda: read_confusion(run.metrics, state.step))
        job.course.costs.update(seen)
    stage("reading the first images")
    with _open_log(job) as log:
        monitor = announce(job, log, corrupt)
        try:
            with open_attempt(job, log, monitor, statistics, stop, heartbeat) as opened:
                stop.begin()
                ending = train(opened)
        except Rollback as error:
            engine.skip()  # otherwise a loss scaler takes the next gradients for unscaled ones
            first, last = error.steps
            log.error(
                "rollback",
                f"{error}; stepping over {first} to {last}",
                first=first,
                last=last,
                loss=error.loss,
                grad_norm=error.norm,
            )
            engine.on_main(log.sync)  # the others read what rank 0 has written
            log.close("stopped")
            return Again.FROM_CHECKPOINT
        except StepFailed as error:
            if error.leaps:  # what is not finite has an event already
                wrong = {"loss": error.loss, "grad_norm": error.norm, "refused": True}
                log.event("spike", step=error.step + 1, **wrong)
            raise
        if ending is Ending.GROWN:
            log.close("stopped")
            return Again.FROM_HERE
        if ending is Ending.LEFT:
            log.close("stopped")
            if engine.rank == 0:
                go_on = f"saved after step {state.step}; go on with `bigbatch resume {run.path}`"
                print(f"bigbatch: {go_on}", file=sys.stderr, flush=True)
            # Leave together: a launcher that sees one rank gone ends the others, and rank 0
            # may still be closing its log.
            engine.barrier()
            return SAVED
        early = stops(recipe.regularise.early_stop, state.evaluations, judged_by(recipe))
        if state.step < plan.total and not early:
            log.close("stopped")
            return 0
        if engine.from_main(bool(unfinished(run, recipe))):
            log.close("stopped")
            if engine.rank == 0:
                go_on = f"its workers go on by `bigbatch resume {run.path}`"
                print(f"bigbatch: the trunk is trained; {go_on}", file=sys.stderr, flush=True)
            return 0
        stop.rest()
        finish(job, log)
    return 0


def _open_log(job: Job) -> Log:
    """This rank's log. What the disk refuses rank 0 is every rank's error. Collective."""
    opened: list[Log] = []

    def open_it() -> None:
        log = open_log(
            job.run,
            job.recipe,
            rank=job.engine.rank,
            total_steps=job.inputs.plan.total,
            start_step=job.state.step,
            epoch_samples=job.inputs.epoch_samples,
        )
        opened.append(log)

    job.engine.on_main(open_it)
    if not opened:
        open_it()
    return opened[0]


def announce(job: Job, log: Log, corrupt: list[str]) -> Monitor:
    """Record that, and with what, an attempt starts."""
    engine, timeline = job.engine, job.inputs.plan.timeline
    step, total = job.state.step, job.inputs.plan.total
    samples = {"samples": timeline.first(step), "total_samples": timeline.first(total)}
    for error in corrupt:
        log.event("damaged_checkpoint", problem=error)
    train_split = job.inputs.splits.get("train")  # a stream has none
    tars = [file.name for file in train_split.shards] if train_split else []
    monitor = Monitor(log, engine, job.recipe, len(job.inputs.outputs), tars)
    log.event(
        "start",
        step=job.state.step,
        total_steps=job.inputs.plan.total,
        **(samples if timeline.changes else {}),
        world_size=engine.world,
        device=str(engine.device),
        host=socket.gethostname(),
        pid=os.getpid(),
        agent=agent_pid(),
        environment=recorded_variables(os.environ),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        flops_per_image=monitor.flops,
        peak_flops=monitor.peak,
    )
    if job.rates:
        log.event("transfer", step=job.state.step, rates=list(job.rates))
    if job.teacher is not None:
        log.event("teacher", step=job.state.step, **job.teacher.described())
    if engine.rank == 0:
        for line in said_variables(os.environ):
            notice(line)
    if engine.rank == 0 and not job.run.contact_sheet.exists():
        try:
            job.save_contact_sheet()
            log.picture("augmented", job.run.contact_sheet)
        except OSError as error:  # a picture is worth no run; the next start makes it
            log.error("disk", f"no contact sheet: {error}")
    return monitor
