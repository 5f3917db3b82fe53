"""The end of a run: the average and the snapshots scored, the summary, the report."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bigbatch.configs.files import to_json, write_atomically
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.judged import judged_by
from bigbatch.configs.notices import going_on
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.terminal import Terminal
from bigbatch.configs.words import plural
from bigbatch.data.index import Index
from bigbatch.data.journal import count, read_journal
from bigbatch.trainers.ensemble.averaged import score_average
from bigbatch.trainers.ensemble.combine import combine, write_alone
from bigbatch.trainers.ensemble.members import find_members, keep_alone, save_snapshot
from bigbatch.trainers.job import Job
from bigbatch.trainers.losses.centres import remove_centres
from bigbatch.trainers.monitoring.history import as_finished, read_history, timed_steps
from bigbatch.trainers.monitoring.log import Log
from bigbatch.trainers.planning.early_stop import best_evaluation
from bigbatch.trainers.planning.swap import worker_runs
from bigbatch.trainers.recovery.stored import MODEL, checkpoint_path
from bigbatch.trainers.recovery.tensor_files import load_weights
from bigbatch.trainers.report.diagnosis import diagnose
from bigbatch.trainers.report.findings import Finding, say_findings
from bigbatch.trainers.report.results import final_table


def finish(job: Job, log: Log) -> None:
    """Score the average, combine the snapshots, and write the summary and the report."""
    engine, recipe = job.engine, job.recipe
    engine.end_training()
    if job.freezing is not None:
        job.freezing.keep_statistics(engine.module, job.state.step)
    if recipe.regularise.early_stop is not None:
        keep_best(job, log)
    splits = {role: index for role, index in job.inputs.splits.items() if role != "train"}

    def recompute() -> None:
        job.precise_bn.recompute(engine.module)

    averaged = finish_average(job, log, splits, recompute)
    remove_centres(engine.module)
    log.phase("combining snapshots")
    scores = combine(
        job.run,
        recipe.ensemble,
        engine,
        job.evaluator,
        splits,
        len(_expected_snapshots(job)),
        recompute=recompute,
    )
    swapped, workers = finish_phases(job, log, splits)
    if scores is None:  # not rank 0
        log.close("finished")
        return
    for role in splits:
        scores[role] |= averaged.get(role, {}) | swapped.get(role, {})
    end(job.run, summarise(job, scores) | workers, log, recipe.log.report)


def end(run: RunDir, summary: dict[str, Any], log: Log, report: bool) -> None:
    """Say the results, write the report if asked, and at last what makes a run a finished one.

    No start looks at a run with a summary again, so all else is there before.
    """
    log.end_progress()
    findings = say_results(run, summary, report)
    write_atomically(run.summary, to_json(summary, indent=1) + "\n")
    log.close("finished")  # only then it is sure where wandb's run lies
    print(f"summary  {run.summary}", flush=True)
    if log.wandb_path is not None:
        print(f"wandb    {log.wandb_path}", flush=True)
    with going_on("no diagnosis", f"`bigbatch diagnose {run.path}` says it"):
        say_findings(findings, Terminal(soft_wrap=True))


def _expected_snapshots(job: Job) -> set[int]:
    """The steps of the snapshots that must be there: of a branch, its own and those it took."""
    origin = job.run.forked_from
    ends = job.inputs.plan.snapshots
    if origin is None or origin.get("snapshots"):
        return set(ends)
    return {step for step in ends if step > origin["at"]}


def keep_best(job: Job, log: Log) -> None:
    """Put the weights of the best evaluation into the model, as the run's one snapshot.

    Collective. Raises UserError where their checkpoint is not there any more.
    """
    run, engine, judge = job.run, job.engine, judged_by(job.recipe)
    best = best_evaluation(job.state.evaluations, judge)
    load_weights(engine.module, checkpoint_path(run.checkpoints, best.step) / MODEL)
    engine.on_main(
        lambda: save_snapshot(
            run.snapshots, 1, best.step, engine.module, best.scores, job.state.info
        )
    )
    log.event("best", step=best.step, **{judge.key: best.scores[judge.key]})


def finish_average(
    job: Job, log: Log, splits: dict[str, Index], recompute: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Scores of the run's average by split, on rank 0, as {"val": {"ema": ...}}. Collective."""
    average, config = job.state.average, job.recipe.average
    if average is None or config is None:
        return {}
    if average.count == 0:
        log.error("average", f"there is no {config.name}: each step that counts for it was skipped")
        return {}
    log.phase("averaging weights")
    found = score_average(
        job.run,
        config.name,
        job.engine.whole(average.averaged()),
        job.engine,
        job.evaluator,
        splits,
        recompute=recompute,
        info=job.state.info,
    )
    return {role: {config.name: scores} for role, scores in found.items()}


def finish_phases(
    job: Job, log: Log, splits: dict[str, Index]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The average of the workers of a run with phases, as `bigbatch ensemble WORKER... --soup
    uniform` makes it, which is then what the run keeps. Collective.

    Its evaluations take the place of the trunk's. Gives, on rank 0, its scores by split, as {"val":
    {"swap": ...}}, and what summary.json says of the workers; nothing of a run without phases.
    """
    config = job.recipe.phases
    if config is None:
        return {}, {}
    from bigbatch.trainers.inference.soup import look_alone, make_soup

    log.phase("averaging workers")
    members = [m for run in worker_runs(job.run, job.recipe) for m in find_members(run)]
    say = partial(print, flush=True) if job.engine.rank == 0 else lambda line: None
    folder, file = job.run.ensemble, f"{config.name}.safetensors"
    soup, record = make_soup(
        job.engine, members, "uniform", splits["val"], folder, name=file, say=say
    )
    looked = look_alone(job.engine, soup, splits)
    seen = {role: found for role, found in looked.items() if found is not None}  # on rank 0

    def keep() -> None:
        keep_alone(job.run, config.name)
        write_alone(job.run, splits, seen)

    job.engine.on_main(keep)
    name: str = config.name
    scores = {role: {name: found.members[0].scores()} for role, found in seen.items()}
    return scores, {"phases": record}


def summarise(job: Job, scores: dict[str, Any]) -> dict[str, Any]:
    """What a script wants to know of a finished run.

    `seconds` is the time in training steps, over all starts of the run; `images_per_s` is
    over the recorded steps.
    """
    total, line = job.state.step, job.inputs.plan.timeline
    steps, trained, taken = 0, 0, 0.0
    for step, seconds in timed_steps(job.run.metrics):
        steps, trained, taken = steps + 1, trained + line.batch(step - 1), taken + seconds
    batch = trained / steps if steps else 0
    mean = taken / steps if steps else None
    samples = line.first(total)
    journal = read_journal(job.run.path)
    return {
        **scores,
        **({"bad_samples": count(journal)} if journal else {}),
        "steps": total,
        "samples": samples,
        "seconds": round(mean * samples / batch, 3) if mean else None,
        "images_per_s": round(batch / mean, 1) if mean else None,
        "world_size": job.engine.world,
        "recipe_hash": recipe_hash(job.recipe),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def say_results(run: RunDir, summary: dict[str, Any], report: bool) -> list[Finding]:
    """The table, which takes no time, and then the `report`, if asked, which takes seconds to draw.

    Returns what is to be said of the run's learning. Raises OSError where the disk does not take
    the report; one that cannot be drawn ends no run.
    """
    console = Terminal(soft_wrap=True)
    console.print(final_table(summary))
    if bad := summary.get("bad_samples"):
        console.print(
            f"{plural(bad['samples'], 'sample')} of {plural(len(bad['shards']), 'shard')} could "
            "not be read: "
            f"bigbatch inspect --journal {run.path}",
            style="yellow",
            highlight=False,
        )
    if not report:
        with going_on("no diagnosis", f"`bigbatch diagnose {run.path}` says it"):
            return diagnose(as_finished(read_history(run), summary))
        return []
    from bigbatch.trainers.report.report import write_report  # matplotlib

    refused: OSError | None = None
    findings: list[Finding] = []
    with going_on("no report", f"`bigbatch report {run.path}` writes it"):
        history = as_finished(read_history(run), summary)
        findings = diagnose(history)
        try:
            print(f"report   {write_report(run, history)}", flush=True)
        except OSError as error:
            refused = error
    if refused is not None:
        raise refused
    return findings
