"""What a change of the batch costs in images/s, in the steps around it.

    python benchmarks/batch_change.py [--quick] [--json FILE] [--changes N]

Real runs on the digits in this process, which decodes by itself, and whose processor time counts,
so that what else the machine does counts for little. In the first the batch goes back and forth
between two sizes, six steps of each: steps around a change and apart from it take turns. `first` is
the one after a change, `last` the one before the next, `around` both, `apart` the two in the middle
of their six. Of each six steps the images/s of those over the ones apart, and the median of these
ratios, by batch. In the second `global_batch: noise_scale` doubles the batch twice, which opens the
log and the data anew: seconds between the steps around a decision beside what such a step takes.
"""

import argparse
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from machine import benchmark_parser, machine, write_figures

from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.data.writing.shard import shard
from bigbatch.trainers import worker
from bigbatch.trainers.monitoring.log import Log

SIZES, STRETCH = (64, 128), 6
PLACES = {"around": (0, STRETCH - 1), "first": (0,), "last": (STRETCH - 1,), "apart": (2, 3)}
SETTINGS = (
    *("micro_batch=32", "data.workers=0", "data.image_size=16", "log.wandb=off", "clip=null"),
    *("log.diagnosis=false", "schedule={name: constant}", "duration=1000 epochs"),
    *("evaluate.every=1000 epochs", "checkpoint.every=1000 epochs", "optimizer.lr=0.01"),
)


def train(folder: Path, steps: int, batch: str) -> list[float]:
    """Processor seconds from the end of one step to that of the next, of steps 2 to `steps`."""
    ends: list[float] = []
    record = Log.train

    def timed(log: Log, step: int, **values: Any) -> None:
        record(log, step, **values)
        ends.append(time.process_time())

    keys = [f"data.path={folder / 'digits'}", *SETTINGS, f"global_batch={batch}"]
    run = create_run(folder / f"run-{len(list(folder.iterdir()))}", load_recipe("digits", keys))
    Log.train = timed  # type: ignore[method-assign]
    try:
        assert worker.main([str(run.path), "--stop-at", str(steps)]) == 0
    finally:
        Log.train = record  # type: ignore[method-assign]
    assert len(ends) == steps
    return [b - a for a, b in pairwise(ends)]


def around_changes(folder: Path, changes: int) -> dict[str, Any]:
    pieces, at = [], 0
    for i in range(changes + 1):
        at += STRETCH * SIZES[i % 2]
        pieces.append(f"{{batch: {SIZES[i % 2]}, until: {at} samples}}")
    pieces.append(f"{{batch: {SIZES[(changes + 1) % 2]}}}")
    batch = f"{{name: stages, pieces: [{', '.join(pieces)}]}}"
    seconds = [0.0, *train(folder, STRETCH * (changes + 1), batch)]
    found: dict[str, Any] = {}
    for i, size in enumerate(SIZES):
        starts = range(STRETCH * (2 + i), len(seconds), 2 * STRETCH)  # what comes first warms up
        own = [seconds[s : s + STRETCH] for s in starts]
        means = [{n: statistics.mean(s[p] for p in at) for n, at in PLACES.items()} for s in own]
        found[str(size)] = {
            "stretches": len(own),
            "images_per_s": round(size / statistics.median(m["apart"] for m in means), 1),
            **{
                f"{name}_over_apart": round(
                    statistics.median(m["apart"] / m[name] for m in means), 4
                )
                for name in ("around", "first", "last")
            },
        }
    return found


def decided(folder: Path) -> dict[str, Any]:
    """What a doubling takes beside its steps: 16 of 32 x 2 images, 8 of 128, then 256."""
    every = 1024
    batch = f"{{name: noise_scale, start: 64, most: 256, every: {every} samples, target: 1e9}}"
    seconds = [0.0, *train(folder, 32, batch)]
    costs = [seconds[at] - statistics.median(seconds[at + 1 : at + 6]) for at in (16, 24)]
    return {"doublings": len(costs), "seconds": [round(cost, 3) for cost in costs]}


def main() -> None:
    parser: argparse.ArgumentParser = benchmark_parser(__doc__, quick="few changes")
    parser.add_argument("--changes", type=int, default=100)
    options = parser.parse_args()
    changes = 7 if options.quick else options.changes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard("digits", folder / "digits", progress=False)
        stages = around_changes(folder, changes)
        grown = decided(folder)
    for size, values in stages.items():
        print(f"batch {size}: {values}")
    print(f"noise_scale: {grown}")
    write_figures(
        options.json,
        machine=machine("bigbatch", "torch", changes=changes),
        stages=stages,
        noise_scale=grown,
    )


if __name__ == "__main__":
    main()
