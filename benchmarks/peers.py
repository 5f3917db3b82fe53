"""A whole training job, against timm's train.py and Lightning: the same images, model, batch,
epochs and cores.

    python benchmarks/peers.py --timm-train PATH/train.py --lightning-python PATH/python
                               [--quick] [--json FILE]

timm's train.py is not in its wheel: take it from a checkout of pytorch-image-models. Lightning
lives in an environment of its own.

The images are crops of scikit-learn's two sample photos, at a short side of 160 to 320
pixels, saved as JPEG in an image folder of two classes. All have two cores of this machine:
bigbatch and Lightning as two processes of one thread with a loader worker each, timm as one
process of two threads (its DistributedDataParallel refuses a CPU) with two. test_resnet at 96
pixels, random resized crop and flip, SGD with Nesterov momentum, global batch 256 in
micro-batches of 64, cosine, evaluation after every epoch. bigbatch also writes shards first
(its own line), and checkpoints, snapshots and a report as always.

Commands take turns; figures are medians of whole commands, ratios medians of the rounds'.
"""

import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import benchmark_parser, machine, write_figures
from PIL import Image
from sklearn.datasets import load_sample_images

SIZE, BATCH, MICRO, EPOCHS, LR = 96, 256, 64, 4, 0.1
BIN = Path(sys.executable).parent

RECIPE = f"""\
data: {{path: shards, test: null, image_size: {SIZE}, workers: 1, threads: 1}}
model: {{name: test_resnet}}
optimizer: {{name: sgd, lr: {LR}, momentum: 0.9, nesterov: true, weight_decay: 2.0e-5}}
duration: {EPOCHS} epochs
global_batch: {BATCH}
micro_batch: {MICRO}
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


def timed(command: list[str], folder: Path, threads: int = 1) -> tuple[float, str]:
    """Seconds, and what the command printed."""
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        sys.exit(done.stdout[-3000:])
    return time.perf_counter() - started, done.stdout


def run_bigbatch(folder: Path, number: int) -> dict[str, float]:
    name = f"b{number}"
    command = [str(BIN / "bigbatch"), "train", "peer.yaml", "--nproc", "2"]
    command += ["--run-dir", f"runs/{name}", "log.wandb=off"]
    seconds, _ = timed(command, folder)
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
    options = f"""
        --data-dir images --val-split val --device cpu --no-prefetcher
        --model test_resnet --num-classes 2 --input-size 3 {SIZE} {SIZE}
        --batch-size {MICRO} --grad-accum-steps {BATCH // MICRO} --workers 2
        --opt sgd --lr {LR} --momentum 0.9 --weight-decay 2e-5
        --sched cosine --epochs {EPOCHS} --warmup-epochs 0 --min-lr 0
        --scale 0.35 1.0 --color-jitter 0 --smoothing 0 --crop-pct 0.875
        --output timm --experiment t{number} --log-interval 1
    """
    seconds, said = timed([sys.executable, str(script.resolve()), *options.split()], folder, 2)
    with (folder / f"timm/t{number}/summary.csv").open() as file:
        best = max(float(row["eval_top1"]) for row in csv.DictReader(file))
    # "Time: 0.512s,  500.00/s  (0.498s,  514.01/s)": of one step, and its running mean.
    rates = [float(r) for r in re.findall(r"Time: [\d.]+s,\s*([\d.]+)/s", said)]
    return {"seconds": seconds, "images_per_s": statistics.median(rates), "accuracy": best}


def run_lightning(folder: Path, python: Path) -> dict[str, float]:
    script = Path(__file__).parent / "peers_lightning.py"
    job = ["images", "2", str(SIZE), str(BATCH), str(EPOCHS), str(LR)]
    seconds, said = timed([str(python), str(script.resolve()), *job], folder)
    line = next(line for line in said.splitlines() if line.startswith('{"images_per_s"'))
    return {"seconds": seconds, **json.loads(line)}


def main() -> None:
    parser = benchmark_parser(__doc__, quick="fewer images, one round")
    parser.add_argument("--timm-train", type=Path, help="timm's train.py")
    parser.add_argument("--lightning-python", type=Path, help="of an environment with Lightning")
    options = parser.parse_args()
    peers: dict[str, Callable[[Path, int], dict[str, float]]] = {}
    if options.timm_train:
        peers["timm"] = lambda folder, number: run_timm(folder, number, options.timm_train)
    if options.lightning_python:
        peers["lightning"] = lambda folder, _: run_lightning(folder, options.lightning_python)
    if not peers:
        print("skipped: no peer is given (--timm-train, --lightning-python)")
        return
    train, val, rounds = (512, 256, 1) if options.quick else (4096, 512, 3)
    contestants = {"bigbatch": run_bigbatch, **peers}
    found: dict[str, list[dict[str, float]]] = {who: [] for who in contestants}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_images(folder / "images", train, val)
        (folder / "peer.yaml").write_text(RECIPE)
        sharding, _ = timed([str(BIN / "bigbatch"), "shard", "images", "shards"], folder)
        for number in range(rounds):
            for who, run in contestants.items():
                found[who].append(run(folder, number))
    medians = {
        who: {key: round(statistics.median(r[key] for r in runs), 2) for key in runs[0]}
        for who, runs in found.items()
    }
    ours = found["bigbatch"]
    ratios = {
        who: {
            "seconds": ratio(found[who], ours, "seconds"),
            "images_per_s": ratio(ours, found[who], "images_per_s"),
        }
        for who in peers
    }
    print(f"shards: {sharding:.1f} s\n{'':12}{'seconds':>9}{'images/s':>10}{'accuracy':>10}")
    for who, row in medians.items():
        print(f"{who:12}{row['seconds']:9.1f}{row['images_per_s']:10.1f}{row['accuracy']:10.2f}")
    for who, row in ratios.items():
        print(f"{who}: {row['seconds']} times the seconds; 1 / {row['images_per_s']} the images/s")
    write_figures(
        options.json,
        machine=machine("bigbatch", "timm", "torch", "torchvision"),
        images={"train": train, "val": val},
        rounds=rounds,
        recipe=RECIPE,
        shard_seconds=sharding,
        runs=found,
        medians=medians,
        ratios=ratios,
    )


def ratio(above: list[dict[str, float]], below: list[dict[str, float]], key: str) -> float:
    """The median of the rounds' ratios."""
    pairs = zip(above, below, strict=True)
    return round(statistics.median(a[key] / b[key] for a, b in pairs), 2)


if __name__ == "__main__":
    main()
