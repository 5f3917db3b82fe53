"""One rank of a run: parse, build, run, close.

    python -m bigbatch.trainers.worker RUN_DIR [--stop-at STEPS]

Started once per rank, with torchrun's environment variables where there are several.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

import torch

from bigbatch.configs.notices import notice
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.attempt import open_attempt
from bigbatch.trainers.engine import Engine, open_engine
from bigbatch.trainers.finish import finish
from bigbatch.trainers.job import Job, build_job
from bigbatch.trainers.loop import train
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.monitoring.log import Log, open_log
from bigbatch.trainers.monitoring.monitor import Monitor
from bigbatch.trainers.monitoring.output import close_output, copy_output
from bigbatch.trainers.planning.environment import recorded_variables, said_variables
from bigbatch.trainers.recovery.failures import report
from bigbatch.trainers.recovery.heartbeat import Heartbeat
from bigbatch.trainers.recovery.resume import acquire_run_lock, resume
from bigbatch.trainers.recovery.rollback import Rollback
from bigbatch.trainers.recovery.signals import SAVED, StopFlag, agent_pid, die_with_agent
from bigbatch.trainers.recovery.watchdog import record_collectives


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bigbatch.trainers.worker")
    parser.add_argument("run", type=Path)
    parser.add_argument("--stop-at", type=int, help="end after this many steps, unfinished")
    options = parser.parse_args(arguments)
    engine: Engine | None = None
    heartbeat: Heartbeat | None = None
    die_with_agent()
    record_collectives()
    copy_output(options.run)
    stop = StopFlag()
    try:
        run = RunDir(options.run)
        recipe = run.recipe()
        engine = open_engine(recipe.backend, recipe.precision, recipe.reduction)
        heartbeat = acquire_run_lock(run, engine)
        return work(build_job(run, recipe, engine, options.stop_at), stop, heartbeat)
    except Exception as error:
        return report(error, engine, options.run)
    finally:
        if heartbeat is not None:
            heartbeat.close()
        if engine is not None:
            engine.close()
        stop.close()


def work(job: Job, stop: StopFlag, heartbeat: Heartbeat) -> int:
    """Train, from wherever the run directory says, until no rollback asks for another try."""
    statistics = StepStatistics(job.engine.module)
    while True:
        status = attempt(job, stop, heartbeat, statistics)
        if status is not None:
            return status


def attempt(
    job: Job, stop: StopFlag, heartbeat: Heartbeat, statistics: StepStatistics
) -> int | None:
    """Go on from the newest checkpoint; the exit status, or None: once more, after a rollback."""
    run, recipe, engine, state = job.run, job.recipe, job.engine, job.state
    plan = job.inputs.plan
    corrupt = resume(run, engine, state, recipe.log.every)
    with open_log(
        run,
        recipe,
        rank=engine.rank,
        total_steps=plan.total,
        start_step=state.step,
        epoch_samples=job.inputs.epoch_samples,
    ) as log:
        monitor = announce(job, log, corrupt)
        try:
            with open_attempt(job, log, monitor, statistics, stop, heartbeat) as opened:
                finished = train(opened)
        except Rollback as error:
            engine.skip()  # otherwise a loss scaler takes the next gradients for unscaled ones
            first, last = error.steps
            log.error(
                "rollback", f"{error}; stepping over {first} to {last}", first=first, last=last
            )
            log.sync()
            log.close("stopped")
            engine.barrier()  # the others read what rank 0 has written
            return None
        if not finished:
            log.close("stopped")
            if engine.rank == 0:
                go_on = f"saved after step {state.step}; go on with `bigbatch resume {run.path}`"
                print(f"bigbatch: {go_on}", file=sys.stderr, flush=True)
            # Leave together: a launcher that sees one rank gone ends the others, and rank 0
            # may still be closing its log.
            engine.barrier()
            return SAVED
        if state.step < plan.total:
            log.close("stopped")
            return 0
        finish(job, log)
    return 0


def announce(job: Job, log: Log, corrupt: list[str]) -> Monitor:
    """Record that, and with what, an attempt starts."""
    engine = job.engine
    for error in corrupt:
        log.event("damaged_checkpoint", problem=error)
    train_split = job.inputs.splits.get("train")  # a stream has none
    tars = [file.name for file in train_split.shards] if train_split else []
    monitor = Monitor(log, engine, job.recipe, len(job.inputs.classes), tars)
    log.event(
        "start",
        step=job.state.step,
        total_steps=job.inputs.plan.total,
        world_size=engine.world,
        device=str(engine.device),
        host=socket.gethostname(),
        pid=os.getpid(),
        agent=agent_pid(),
        environment=recorded_variables(os.environ),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        flops_per_image=monitor.flops,
        peak_flops=monitor.peak,
    )
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


if __name__ == "__main__":
    status = main()
    close_output()
    # Everything is closed. Python's own way out would, once in about fifteen starts on CPU,
    # end in "terminate called without an active exception" from a thread of gloo's.
    os._exit(status)
