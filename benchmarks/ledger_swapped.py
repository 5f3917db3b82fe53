"""What swapped recomputation adds to a training step: the part of benchmarks/ledger.py on it.

Real runs of one rank, in this process, with a check in every second step: what such a step takes
beyond its neighbour without one, by the processor's time, medians over pairs. The rank loads and
computes a micro-batch once more, as one of many does for its neighbour: it reads and decodes it in
this process, too. A step of one micro-batch for each rank pays most: a check is a second step.
"""

import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from against import photos, write_sources

from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.data.writing.shard import shard
from bigbatch.trainers import worker
from bigbatch.trainers.corruption.check import CorruptionCheck

EVERY = 100  # steps between checks, of which the share is one of
COMMON = [
    *("duration=1000000 steps", "schedule={name: constant}", "checkpoint.every=1000000 steps"),
    *("evaluate={every: 1000000 steps}", "log={wandb: off, diagnosis: false, ledger_every: null}"),
    *("data.workers=0", "data.threads=1", "precision=fp32"),
    "recovery.corruption={digest_every: null, recompute_every: 2}",
]
# Recipe, network, pixels, images of a micro-batch, micro-batches of a step, pairs of steps
CASES = [
    ("digits", "test_resnet", 32, 64, 1, 24),
    ("digits", "test_resnet", 32, 64, 4, 8),
    ("imagenet-resnet50", "resnet18", 64, 32, 1, 8),
    ("imagenet-resnet50", "resnet50", 224, 4, 1, 4),
]


def measure(case: tuple[str, str, int, int, int, int], folder: Path, rounds: int) -> dict[str, Any]:
    recipe, network, size, images, count, _ = case
    data = folder / recipe
    if not data.exists():
        source = "digits"
        if recipe != "digits":
            source = str(write_sources(folder, photos(None, 300))["folder"])
        shard(source, data, progress=False)
    own = [f"data.path={data}", f"data.image_size={size}", f"model.name={network}"]
    own += [f"micro_batch={images}", f"global_batch={images * count}", "reduction=exact"]
    run = create_run(folder / f"{network}-{count}", load_recipe(recipe, [*COMMON, *own]))
    begin, began = CorruptionCheck.begin, []

    def begin_timed(self: CorruptionCheck, step: int, micro_batches: int) -> None:
        began.append(time.process_time())
        begin(self, step, micro_batches)

    CorruptionCheck.begin = begin_timed  # type: ignore[method-assign]
    try:
        assert worker.main([str(run.path), "--stop-at", str(2 * rounds + 5)]) == 0
    finally:
        CorruptionCheck.begin = begin  # type: ignore[method-assign]
    steps = [b - a for a, b in pairwise(began)][4:]  # the first warm up
    pairs = list(zip(steps[::2], steps[1::2], strict=True))
    plain = statistics.median(without for without, _ in pairs)
    added = statistics.median(checked - without for without, checked in pairs)
    return {
        "step_ms": round(1e3 * plain, 2),
        "check_ms": round(1e3 * added, 2),
        "share": round(added / plain / EVERY, 5),
        "pairs": len(pairs),
    }


def name_of(case: tuple[str, str, int, int, int, int]) -> str:
    _, network, size, images, count, _ = case
    return f"{network}, {size} pixels, {count} x {images} images"
