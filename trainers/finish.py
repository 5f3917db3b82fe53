"""The end of a run: snapshots combined, the summary, the report."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from bigbatch.configs.files import read_jsonl, to_json, write_atomically
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.rundir import RunDir
from bigbatch.data.journal import count, read_journal
from bigbatch.trainers.ensemble.combine import combine
from bigbatch.trainers.job import Job
from bigbatch.trainers.monitoring.log import Log

# Enough images to settle the BatchNorm statistics of a soup.
_RECOMPUTE_IMAGES = 16_384


def finish(job: Job, log: Log) -> None:
    """Combine the snapshots, and write the summary and the report."""
    log.phase("combining snapshots")
    job.engine.end_training()
    recipe, splits = job.recipe, job.inputs.splits
    images = min(_RECOMPUTE_IMAGES, job.inputs.epoch_samples)
    steps = -(-images // recipe.global_batch)

    def recompute_images() -> Iterator[torch.Tensor]:
        return (job.augmenter.train(batch)[0] for batch in job.batches(0, steps))

    scores = combine(
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
    write_atomically(job.run.summary, to_json(summary, indent=1) + "\n")
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
