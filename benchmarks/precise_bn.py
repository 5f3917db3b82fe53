"""How many training images precise BatchNorm needs: accuracy over images that statistics are of.

    python benchmarks/precise_bn.py --cifar10 PARQUET [--quick] [--folder DIR] [--json FILE]

Runs of few steps, by the recipe of benchmarks/large_batch.py (three epochs of CIFAR-10, Muon).
Their last weights get statistics of so and so many training images, each time of others (the order
and views of another seed), and are scored on the test split. Of each number the mean accuracy in
per cent, and the standard deviation over the choices of images.
"""

import json
import statistics
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import large_batch
from machine import benchmark_parser, lacks_cifar10, machine, write_figures
from trials import train

RATES = {1024: 0.21, 4096: 0.3, 16384: 0.42}  # of Muon by batch: large-batch-2026-11-30.json
IMAGES = (256, 512, 1024, 2048, 4096, 8192)
CHOICES = 6


def scores(run: Any, images: tuple[int, ...], choices: int) -> dict[str, dict[str, float]]:
    """Of a finished run's last weights, by the number of images."""
    from bigbatch.trainers.engine import open_engine
    from bigbatch.trainers.ensemble.members import find_members
    from bigbatch.trainers.job import build_job

    (member,) = find_members(run)
    engine = open_engine("ddp", "fp32")
    found: dict[int, list[float]] = {count: [] for count in images}
    most = member.recipe.evaluate.model_copy(update={"precise_bn_images": max(images)})
    for choice in range(choices):
        recipe = member.recipe.model_copy(update={"seed": 100 + choice, "evaluate": most})
        job = build_job(run, recipe, engine, None)
        model = member.build(engine.device)
        split = job.inputs.splits["test"]
        for count in images:
            job.precise_bn.recompute(model, count)
            logits = job.evaluator.logits(model, split)
            assert logits is not None
            found[count].append(100 * float((logits.argmax(1) == split.label).mean()))
    return {
        str(count): {
            "mean": round(statistics.mean(those), 3),
            "deviation": round(statistics.stdev(those), 3),
        }
        for count, those in found.items()
    }


def main() -> None:
    parser = benchmark_parser(__doc__, quick="few images, one batch, two choices")
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as Parquet")
    parser.add_argument("--folder", type=Path, help="keep shards and runs here")
    options = parser.parse_args()
    if lacks_cifar10(parser, options.cifar10):
        return
    plan, rates, images, choices = large_batch.PLANS["cpu"], RATES, IMAGES, CHOICES
    if options.quick:
        plan = replace(plan, images=2560, epochs=1)
        rates, images, choices = {1024: 0.21}, (256, 512), 2
    figures: dict[str, Any] = {}
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        large_batch.write_shards(options.cifar10.resolve(), folder, plan.images)
        for batch, lr in rates.items():
            trial = large_batch.Trial("muon", batch, lr, 1, plan.epochs)
            run, summary = train(
                trial.name, large_batch.recipe_tree(plan, trial, folder / "shards"), folder
            )
            assert summary is not None
            running = large_batch.with_running_statistics(run)["test_running"]
            by_images = scores(run, images, choices)
            figures[trial.name] = {
                "steps": summary["steps"],
                "running_statistics": round(100 * running, 3),
                "by_images": by_images,
            }
            print(trial.name, json.dumps(figures[trial.name]), flush=True)
    write_figures(options.json, machine=machine("bigbatch", "timm", "torch"), figures=figures)


if __name__ == "__main__":
    main()
