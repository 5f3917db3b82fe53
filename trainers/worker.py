"""One rank of a run: parse, build, run, close.

    python -m bigbatch.trainers.worker RUN_DIR [--stop-at STEPS]

Started once per rank, with torchrun's environment variables where there are several.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigbatch.configs.errors import UserError, is_refused
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.redact import message
from bigbatch.configs.rundir import RunDir, read_jsonl, remove_leftovers, write_atomically
from bigbatch.data.journal import count, read_journal
from bigbatch.trainers.engine import Engine, is_lost_peer, open_engine
from bigbatch.trainers.ensemble import combine, members
from bigbatch.trainers.evaluation.metrics import score, softmax
from bigbatch.trainers.job import Job, build_job
from bigbatch.trainers.loop import train
from bigbatch.trainers.losses.build import build_loss
from bigbatch.trainers.models.batch_stats import StepStatistics
from bigbatch.trainers.monitoring.log import Log, last_step, open_log
from bigbatch.trainers.monitoring.monitor import Monitor
from bigbatch.trainers.monitoring.output import close_output, copy_output
from bigbatch.trainers.planning.plateau import Evaluation, read_evaluations
from bigbatch.trainers.recovery import oom
from bigbatch.trainers.recovery.checkpoint import (
    Retention,
    TrainState,
    load_checkpoint,
    newest_valid,
)
from bigbatch.trainers.recovery.heartbeat import Heartbeat
from bigbatch.trainers.recovery.rollback import Range, Rollback, read_rollbacks, remove_stale
from bigbatch.trainers.recovery.saving import Saver
from bigbatch.trainers.recovery.signals import SAVED, StopFlag, agent_pid, die_with_agent
from bigbatch.trainers.recovery.watchdog import Watchdog, record_collectives

# Enough images to settle the BatchNorm statistics of a soup.
_RECOMPUTE_IMAGES = 16_384


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
        heartbeat = hold(run, engine)
        return work(build_job(run, recipe, engine, options.stop_at), stop, heartbeat)
    except UserError as error:
        if engine is None or engine.speaks():
            who = f"rank {engine.rank}: " if engine is not None and engine.rank > 0 else ""
            print(f"bigbatch: {who}{message(error)}", file=sys.stderr, flush=True)
        return 2
    except (RuntimeError, MemoryError) as error:
        rank = 0 if engine is None else engine.rank
        if oom.is_out_of_memory(error):
            print(f"bigbatch: {oom.explain(error, rank)}", file=sys.stderr, flush=True)
            return 2
        if not is_lost_peer(error):
            raise
        # Not this rank's doing: the one that ended, or its agent, says why.
        print(f"bigbatch: rank {rank} lost another rank", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        if not is_refused(error):
            raise
        print(
            f"bigbatch: cannot go on with {options.run}: {error}; free some space or fix the "
            f"permissions, then `bigbatch resume {options.run}` starts from the newest checkpoint "
            "and writes what is missing",
            file=sys.stderr,
            flush=True,
        )
        return 2
    finally:
        if heartbeat is not None:
            heartbeat.close()
        if engine is not None:
            engine.close()
        stop.close()


def hold(run: RunDir, engine: Engine) -> Heartbeat:
    """This rank's heartbeat. Rank 0's is the lock on the run; UserError where another has it."""
    problem = heartbeat = None
    try:
        heartbeat = Heartbeat(run.heartbeats, engine.rank)
        if engine.rank == 0:
            heartbeat.lock()
            remove_leftovers(run)
    except OSError as error:
        problem = f"cannot write in {run.path}: {error}; free some space or fix the permissions"
    except UserError as error:
        problem = str(error)
    said = engine.from_main(problem)
    if said:
        raise UserError(said)
    if heartbeat is None:  # this machine alone cannot write there
        raise UserError(str(problem))
    return heartbeat


def work(job: Job, stop: StopFlag, heartbeat: Heartbeat) -> int:
    """Go on from the newest checkpoint, train, combine the snapshots, report."""
    statistics = StepStatistics(job.engine.module)
    while True:
        status = attempt(job, stop, heartbeat, statistics)
        if status is not None:
            return status


def attempt(
    job: Job, stop: StopFlag, heartbeat: Heartbeat, statistics: StepStatistics
) -> int | None:
    """Go on from where the run directory says; returns the exit status, or None: once more."""
    run, recipe, engine, state = job.run, job.recipe, job.engine, job.state
    plan = job.inputs.plan
    problems = resume(run, engine, state, recipe.log.every)
    # What a plateau looks at is replayed; every rank takes rank 0's reading.
    history = read_evaluations(run.metrics, state.step) if engine.rank == 0 else []
    job.inputs.evaluations[:] = [Evaluation(*e) for e in engine.from_main(history)]
    with open_log(
        run,
        recipe,
        rank=engine.rank,
        total_steps=plan.total,
        start_step=state.step,
        epoch_samples=job.inputs.epoch_samples,
    ) as log:
        for problem in problems:
            log.event("damaged_checkpoint", problem=problem)
        train_split = job.inputs.splits.get("train")  # a stream has none
        shards = [file.name for file in train_split.shards] if train_split else []
        monitor = Monitor(log, engine, recipe, len(job.inputs.classes), shards)
        log.event(
            "start",
            step=state.step,
            total_steps=plan.total,
            world_size=engine.world,
            device=str(engine.device),
            host=socket.gethostname(),
            pid=os.getpid(),
            agent=agent_pid(),
            flops_per_image=monitor.flops,
            peak_flops=monitor.peak,
        )
        if engine.rank == 0 and not run.contact_sheet.exists():
            try:
                job.save_contact_sheet()
                log.picture("augmented", run.contact_sheet)
            except OSError as error:  # a picture is worth no run; the next start makes it
                log.problem("disk", f"no contact sheet: {error}")

        def evaluate() -> dict[str, float]:
            val = job.inputs.splits["val"]
            with engine.whole() as model:
                logits = job.evaluator.logits(model, val)
            found = None if logits is None else score(softmax(logits), val.label.astype(np.int64))
            scores: dict[str, float] = engine.from_main(found)
            job.inputs.evaluations.append(Evaluation(state.step, scores))
            return scores

        def snapshot(scores: dict[str, float]) -> None:
            number = sorted(plan.snapshots).index(state.step) + 1
            with engine.whole() as model:
                if engine.rank == 0:
                    members.save_snapshot(run.snapshots, number, state.step, model, scores)
            engine.barrier()

        keep = recipe.checkpoint
        back = recipe.recovery.step_over if recipe.recovery.max_rollbacks else 0
        retention = Retention(keep.keep, keep.keep_best, plan.keep_every, back)
        name = engine.from_main(f"{time.time_ns()}-{os.getpid()}")
        try:
            with (
                # Last to end: its wait for a slow disk, after an error, is no step that hangs.
                Saver(run.checkpoints, engine, log, retention) as saver,
                Watchdog(run, heartbeat, engine.world, name, recipe.recovery.stall_s) as watchdog,
                closing(job.traced_batches(state.step, plan.stop)) as batches,
            ):
                if recipe.recovery.max_rollbacks and state.step == 0:
                    saver.save(state)  # there is always something to go back to
                finished = train(
                    recipe,
                    engine,
                    state,
                    log,
                    plan=plan,
                    statistics=statistics,
                    schedule=job.inputs.schedule,
                    loss_function=build_loss(recipe.loss),
                    batches=batches,
                    augmenter=job.augmenter,
                    evaluate=evaluate,
                    snapshot=snapshot,
                    saver=saver,
                    watchdog=watchdog,
                    stop=stop,
                    monitor=monitor,
                )
        except Rollback as error:
            engine.skip()  # otherwise a loss scaler takes the next gradients for unscaled ones
            first, last = error.steps
            log.problem(
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


def resume(run: RunDir, engine: Engine, state: TrainState, every: int) -> list[str]:
    """Fill `state` from where the run can go on; the order is:

    1. the newest checkpoint in the run directory that verifies and whose steps all have their
       record in metrics.jsonl, one `every` so many steps,
    2. the newest one that verifies,
    3. with no checkpoint at all, step 0 with the model as built.

    Rank 0 chooses, so that all ranks load the same one. Returns what is damaged.
    """
    found: tuple[str | None, list[str], str | None] = (None, [], None)
    over: list[Range] = []
    if engine.rank == 0:
        try:
            recorded = last_step(run.metrics)
            over = read_rollbacks(run)
            remove_stale(run.checkpoints, over)

            def objection(step: int) -> str | None:
                if recorded >= step - step % every:
                    return None
                return f"{run.metrics} ends after step {recorded}"

            path, problems = newest_valid(run.checkpoints, objection)
            found = (str(path) if path else None, problems, None)
        except UserError as error:
            found = (None, [], str(error))
    chosen, problems, failure = engine.from_main(found)
    over = engine.from_main(over)
    if failure:
        raise UserError(failure)
    if engine.rank == 0:
        for problem in problems:
            print(f"bigbatch: {problem}; going on from an older one", file=sys.stderr)
    if chosen:
        load_checkpoint(Path(chosen), state)
    elif state.step > 0:
        raise UserError(f"{run.checkpoints} holds nothing to go back to; resume the run")
    state.over += [steps for steps in over if steps not in state.over]
    return problems


def finish(job: Job, log: Log) -> None:
    """Combine the snapshots, and write the summary and the report."""
    log.phase("combining snapshots")
    job.engine.end_training()
    recipe, splits = job.recipe, job.inputs.splits
    images = min(_RECOMPUTE_IMAGES, job.inputs.epoch_samples)
    steps = -(-images // recipe.global_batch)

    def recompute_images() -> Iterator[torch.Tensor]:
        return (job.augmenter.train(batch)[0] for batch in job.batches(0, steps))

    scores = combine.combine(
        job.run,
        recipe.ensemble,
        job.engine,
        job.evaluator,
        {role: index for role, index in splits.items() if role != "train"},
        len(job.inputs.plan.snapshots),
        recompute_images=recompute_images,
        recompute_batches=steps * recipe.micro_batches,
    )
    if scores is None:  # not rank 0
        log.close("finished")
        return
    summary = summarise(job, scores)
    write_atomically(job.run.summary, json.dumps(summary, indent=1) + "\n")
    log.close("finished")
    say_results(job.run, summary, log)


def summarise(job: Job, scores: dict[str, Any]) -> dict[str, Any]:
    """What a script wants to know of a finished run.

    `seconds` is the time in training steps, over all starts of the run; `images_per_s` is
    over the recorded steps.
    """
    total, batch = job.inputs.plan.total, job.recipe.global_batch
    steps = [r["step_s"] for r in read_jsonl(job.run.metrics) if r["kind"] == "train"]
    mean = sum(steps) / len(steps) if steps else None
    journal = read_journal(job.run.path)
    return {
        **scores,
        **({"bad_samples": count(journal)} if journal else {}),
        "steps": total,
        "samples": total * batch,
        "seconds": round(mean * total, 3) if mean else None,
        "images_per_s": round(batch / mean, 1) if mean else None,
        "world_size": job.engine.world,
        "recipe_hash": recipe_hash(job.recipe),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def say_results(run: RunDir, summary: dict[str, Any], log: Log) -> None:
    """The table and the paths that a user looks for when a run ends."""
    from rich.console import Console

    from bigbatch.trainers.report.report import (  # matplotlib: only here
        final_table,
        write_report,
    )

    console = Console(soft_wrap=True)
    console.print(final_table(summary))
    if bad := summary.get("bad_samples"):
        console.print(
            f"{bad['samples']:,} samples of {len(bad['shards']):,} shards could not be read: "
            f"bigbatch inspect --journal {run.path}",
            style="yellow",
            highlight=False,
        )
    console.print(f"summary  {run.summary}", highlight=False)
    console.print(f"report   {write_report(run)}", highlight=False)
    if log.wandb_path is not None:
        console.print(f"wandb    {log.wandb_path}", highlight=False)


if __name__ == "__main__":
    status = main()
    close_output()
    # Everything is closed. Python's own way out would, once in about fifteen starts on CPU,
    # end in "terminate called without an active exception" from a thread of gloo's.
    os._exit(status)
