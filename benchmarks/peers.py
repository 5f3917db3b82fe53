"""A whole training job, against timm's train.py: the same images, model, batch and epochs.

    python benchmarks/peers.py --timm-train PATH/train.py [--quick] [--json FILE]

timm's train.py is not in its wheel: take it from a checkout of pytorch-image-models.

The images are crops of scikit-learn's two sample photos, at a short side of 160 to 320
pixels, saved as JPEG in an image folder of two classes. Both trainers have two cores of
this machine: bigbatch as two processes of one thread, timm as one process of two threads
(its DistributedDataParallel refuses a CPU) with two loader workers. test_resnet at 96
pixels, random resized crop and flip, SGD with Nesterov momentum, global batch 256, cosine,
evaluation after every epoch. bigbatch also writes shards first (its own line), and
checkpoints, snapshots and a report as always.

Commands are run in turn, A B A B; figures are medians of whole commands, in seconds.
"""

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine
from PIL import Image
from sklearn.datasets import load_sample_images

SIZE, BATCH, EPOCHS, LR = 96, 256, 4, 0.1
BIN = Path(sys.executable).parent

RECIPE = f"""\
data: {{path: shards, test: null, image_size: {SIZE}, workers: 1, threads: 1}}
model: {{name: test_resnet}}
optimizer: {{name: sgd, lr: {LR}, momentum: 0.9, nesterov: true, weight_decay: 2.0e-5}}
duration: {EPOCHS} epochs
global_batch: {BATCH}
augment: {{crop: {{scale: [0.35, 1.0]}}, flip: 0.5}}
evaluate: {{crop_fraction: 0.875}}
"""


def write_images(folder: Path, train: int, val: int) -> None:
    """folder/SPLIT/CLASS/*.jpg, crops of real photos."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
            target = folder / split / name
            target.mkdir(parents=True)
            for number in range(count // 2):
                height, width = rng.integers(160, 321, 2)
                top = rng.integers(0, photo.shape[0] - height)
                left = rng.integers(0, photo.shape[1] - width)
                crop = Image.fromarray(photo[top : top + height, left : left + width])
                crop.save(target / f"{number:05d}.jpg", quality=90)


def timed(command: list[str], folder: Path, threads: int = 1) -> float:
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
    with (folder / "output.txt").open("ab") as output:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output)
    if done.returncode:
        sys.exit((folder / "output.txt").read_text(errors="replace")[-3000:])
    return time.perf_counter() - started


def run_bigbatch(folder: Path, number: int) -> dict[str, float]:
    name = f"b{number}"
    command = [str(BIN / "bigbatch"), "train", "peer.yaml", "--nproc", "2"]
    command += ["--run-dir", f"runs/{name}", "log.wandb=off"]
    seconds = timed(command, folder)
    records = [
        json.loads(line)
        for line in (folder / f"runs/{name}/metrics.jsonl").read_text().split("\n")[:-1]
    ]
    steps = [r["step_s"] for r in records if r["kind"] == "train"]
    best = max(r["accuracy"] for r in records if r["kind"] == "eval")
    return {
        "seconds": seconds,
        "images_per_s": BATCH / statistics.median(steps),
        "accuracy": 100 * best,
    }


def run_timm(folder: Path, number: int, script: Path) -> dict[str, float]:
    command = [
        *(sys.executable, str(script.resolve())),
        *("--data-dir", "images", "--val-split", "val", "--device", "cpu"),
        *(
            "--model",
            "test_resnet",
            "--num-classes",
            "2",
            "--input-size",
            "3",
            str(SIZE),
            str(SIZE),
        ),
        *("--batch-size", "64", "--grad-accum-steps", str(BATCH // 64), "--workers", "2"),
        *("--opt", "sgd", "--lr", str(LR), "--momentum", "0.9", "--weight-decay", "2e-5"),
        *("--sched", "cosine", "--epochs", str(EPOCHS), "--warmup-epochs", "0", "--min-lr", "0"),
        *(
            "--scale",
            "0.35",
            "1.0",
            "--color-jitter",
            "0",
            "--smoothing",
            "0",
            "--crop-pct",
            "0.875",
        ),
        *(
            "--no-prefetcher",
            "--output",
            "timm",
            "--experiment",
            f"t{number}",
            "--log-interval",
            "1",
        ),
    ]
    before = (folder / "output.txt").stat().st_size if (folder / "output.txt").exists() else 0
    seconds = timed(command, folder, threads=2)
    with (folder / f"timm/t{number}/summary.csv").open() as file:
        best = max(float(row["eval_top1"]) for row in csv.DictReader(file))
    said = (folder / "output.txt").read_bytes()[before:].decode()
    # "Time: 0.512s,  500.00/s  (0.498s,  514.01/s)": of one step, and its running mean.
    rates = [float(r) for r in re.findall(r"Time: [\d.]+s,\s*([\d.]+)/s", said)]
    return {"seconds": seconds, "images_per_s": statistics.median(rates), "accuracy": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--timm-train", type=Path, help="timm's train.py")
    parser.add_argument("--quick", action="store_true", help="fewer images, one pair")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.timm_train is None:
        print("skipped: give timm's train.py by --timm-train")
        return
    train, val, pairs = (512, 256, 1) if options.quick else (4096, 512, 3)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_images(folder / "images", train, val)
        (folder / "peer.yaml").write_text(RECIPE)
        shard = [str(BIN / "bigbatch"), "shard", "images", "shards"]
        sharding = timed(shard, folder)
        found: dict[str, list[dict[str, float]]] = {"bigbatch": [], "timm": []}
        for number in range(pairs):
            found["bigbatch"].append(run_bigbatch(folder, number))
            found["timm"].append(run_timm(folder, number, options.timm_train))
    medians = {
        who: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for who, runs in found.items()
    }
    result = {
        "machine": machine("bigbatch", "timm", "torch", "torchvision"),
        "images": {"train": train, "val": val},
        "pairs": pairs,
        "recipe": RECIPE,
        "shard_seconds": sharding,
        "runs": found,
        "medians": medians,
        "ratio": {
            "command_seconds": medians["timm"]["seconds"] / medians["bigbatch"]["seconds"],
            "images_per_s": medians["bigbatch"]["images_per_s"] / medians["timm"]["images_per_s"],
        },
    }
    print(json.dumps({k: result[k] for k in ("shard_seconds", "medians", "ratio")}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
