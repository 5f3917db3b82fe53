"""How threads of OpenMP wait for work: what it costs processes that decode beside them.

    python benchmarks/waiting.py [--photos TAR] [--rounds N] [--case NAME] [--quick] [--json FILE]

libgomp's threads spin for milliseconds before they sleep (its documentation, "OMP_WAIT_POLICY" and
"GOMP_SPINCOUNT"). Between the operations of a network, or while Python is at work, one core of
two is then busy with nothing, and the processes that decode images want it.

Each case is a whole command on all cores of this machine, one rank: `bigbatch evaluate` of
test_resnet at 96 and resnet18 at 224, and `bigbatch train` of the digits recipe (steps of 0.1 s of
many small operations), test_resnet at 96 and resnet18 at 64. Waiting as the library has it
("default"), at once asleep ("passive"), and asleep after so many turns ("spin N"). They take turns;
wall seconds and CPU seconds of commands, images/s of training in mid-run; medians, and ratios to
the default's as medians of the rounds'. The JPEGs are those of TAR, else generated ones.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import benchmark_parser, machine, write_figures
from predict import jpegs, shard, write_images, write_run

BIN = Path(sys.executable).parent
WAYS = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
}
TRAIN = """\
data: {{path: shards, train: few, val: few, test: null, image_size: {size}, workers: 2, threads: 1}}
model: {{name: {model}}}
optimizer: {{name: sgd, lr: 0.01, nesterov: true}}
duration: {steps} steps
global_batch: 128
micro_batch: 64
augment: {{crop: {{scale: [0.35, 1.0]}}, flip: 0.5}}
evaluate: {{every: 100 epochs}}
log: {{every: 1}}
"""
EVALUATED = {"test_resnet": 96, "resnet18": 224}
TRAINED = {"test_resnet": (96, 40), "resnet18": (64, 24)}


def run(command: list[str], folder: Path, way: str) -> dict[str, float]:
    """Wall and CPU seconds of a command and of all that it starts."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "WANDB_MODE": "offline"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        command, cwd=folder, env=kept | threads | WAYS[way], check=True, capture_output=True
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu}


def train(recipe: str, folder: Path, name: str, way: str, *changes: str) -> dict[str, float]:
    command = [str(BIN / "bigbatch"), "train", recipe, "--nproc", "1", "--run-dir", f"runs/{name}"]
    found = run([*command, "log.wandb=off", "log.every=1", *changes], folder, way)
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rates = [r["images_per_s"] for r in map(json.loads, lines) if r["kind"] == "train"]
    return {**found, "images_per_s": statistics.median(rates[5:])}


def measure(folder: Path, case: str, way: str, number: int) -> dict[str, float]:
    kind, _, model = case.partition(" ")
    name = f"{way}-{number}-{case}".replace(" ", "-")
    if kind == "evaluate":
        options = ["--members", "cycle-01", "--out", f"out/{name}"]
        return run([str(BIN / "bigbatch"), "evaluate", f"runs/{model}", *options], folder, way)
    if model == "digits":
        changes = ("duration=40 steps", "schedule=cosine", "evaluate.every=100 epochs")
        return train("digits", folder, name, way, *changes)
    return train(f"{model}.yaml", folder, name, way)


def main() -> None:
    parser = benchmark_parser(__doc__, quick="few images, one round")
    parser.add_argument("--photos", type=Path, help="tar of JPEGs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", action="append", help="this one, and no other that is not named")
    options = parser.parse_args()
    images, rounds = (200, 1) if options.quick else (2000, options.rounds)
    cases = [f"evaluate {model}" for model in EVALUATED]
    cases += ["train digits", *(f"train {model}" for model in TRAINED)]
    cases = [case for case in cases if options.case is None or case in options.case]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_images(folder / "images" / "validation", jpegs(options.photos), images)
        shard(folder, "few", "images/validation")
        (folder / "shards" / "all").symlink_to(folder / "shards" / "few")
        digits = [str(BIN / "bigbatch"), "shard", "digits", "shards/digits"]
        subprocess.run(digits, cwd=folder, check=True, capture_output=True)
        for model, size in EVALUATED.items():
            write_run(folder / "runs" / model, folder / "shards", model, size, 1)
        for model, (size, steps) in TRAINED.items():
            recipe = TRAIN.format(model=model, size=size, steps=steps)
            (folder / f"{model}.yaml").write_text(recipe)
        for case in cases:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for number in range(rounds):
                for way in WAYS:
                    found[way].append(measure(folder, case, way, number))
            figures[case] = {way: _summary(runs, found["default"]) for way, runs in found.items()}
            for way, summary in figures[case].items():
                print(f"{case:22} {way:12}", summary, flush=True)
    write_figures(options.json, machine=machine("bigbatch", "torch"), rounds=rounds, **figures)


def _summary(runs: list[dict[str, float]], default: list[dict[str, float]]) -> dict[str, Any]:
    pairs = list(zip(runs, default, strict=True))
    return {key: round(statistics.median(r[key] for r in runs), 2) for key in runs[0]} | {
        f"{key}, ratio": round(statistics.median(r[key] / d[key] for r, d in pairs), 3)
        for key in runs[0]
    }


if __name__ == "__main__":
    main()
