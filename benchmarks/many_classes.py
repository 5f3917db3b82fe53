"""What grows with the number of classes: memory of training, evaluation and the report.

    python benchmarks/many_classes.py [--classes 1000,100000] [--samples N] [--quick] [--json FILE]

For each number of classes shards of 2,048 training images and N validation images (50,000), all of
one tiny picture, with labels spread over the classes; a network of 8 features and one linear layer
on them is trained for four steps with two snapshots, to its end with ensemble and report; then
`bigbatch evaluate` scores both members, and `bigbatch report` writes the page anew. Of each command
the peak resident memory of its largest process (ru_maxrss) and the seconds. `model_mb` is what the
model itself takes while it trains: weights, gradients, momentum and the two snapshots.
"""

import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import benchmark_parser, machine, write_figures
from PIL import Image
from torch import nn

from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.data.index import build_index
from bigbatch.data.tar import write_end, write_member

FEATURES, TRAINED = 8, 2048


def network(num_classes: int, in_chans: int) -> nn.Module:
    """Eight means of the picture, and a classifier."""
    pooled = [nn.AdaptiveAvgPool2d((2, 4)), nn.Flatten(), nn.Linear(8 * in_chans, FEATURES)]
    model = nn.Sequential(*pooled, nn.ReLU(), nn.Linear(FEATURES, num_classes))
    nn.init.normal_(model[-1].weight, std=1.0)
    return model


def write_split(folder: Path, count: int, classes: int) -> None:
    folder.mkdir(parents=True)
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "PNG")
    labels = np.linspace(0, classes - 1, count).round().astype(int)
    with (folder / "000000.tar").open("wb") as tar:
        for sample, label in enumerate(labels):
            write_member(tar, f"{sample:07d}.png", file.getvalue())
            write_member(tar, f"{sample:07d}.cls", str(label).encode())
        write_end(tar)
    build_index(folder)


def command(*arguments: str) -> dict[str, float]:
    """Peak memory of the largest process, in MB, and seconds."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    said = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    return {"peak_mb": usage.ru_maxrss / 1024, "seconds": time.monotonic() - began}


def measure(folder: Path, classes: int, samples: int) -> dict[str, dict[str, float] | float]:
    data = folder / "shards"
    write_split(data / "train", TRAINED, classes)
    write_split(data / "val", samples, classes)
    changes = [
        *(f"data.path={data}", "data.test=null", "data.sampling=uniform", "data.image_size=8"),
        *("model={name: 'many_classes:network'}", "augment.mean=[0.5]", "augment.std=[0.25]"),
        *("global_batch=256", "micro_batch=64", "duration=4 steps", "evaluate.every=2 steps"),
        *(
            "schedule={name: cycles, cycles: 2, warmup: 0 steps, rewarmup: 0 steps}",
            "log.wandb=off",
            "evaluate.batch=64",
        ),
        *("optimizer={name: sgd, lr: 0.1}", "data.workers=0", "average=null"),
    ]
    run = create_run(folder / "runs" / "many", load_recipe("digits", changes, say=None))
    weights = 4 * (FEATURES + 1) * classes
    cli = ("-m", "bigbatch.launcher.cli")
    return {
        "model_mb": 5 * weights / 2**20,
        "train": command("-m", "bigbatch.trainers.worker", str(run.path)),
        "evaluate": command(
            *("-m", "bigbatch.trainers.inference", "evaluate", str(run.path)),
            *("--source", str(data / "val"), "--json"),
        ),
        "report": command(*cli, "report", str(run.path)),
        "page_mb": run.report.stat().st_size / 2**20,
    }


def main() -> None:
    parser = benchmark_parser(__doc__, quick="2,000 classes and 500 samples")
    parser.add_argument("--classes", default="1000,100000")
    parser.add_argument("--samples", type=int, default=50_000)
    options = parser.parse_args()
    numbers = [50, 2000] if options.quick else [int(n) for n in options.classes.split(",")]
    samples = 500 if options.quick else options.samples
    figures = {}
    for classes in numbers:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), classes, samples)
        figures[str(classes)] = found
        print(f"{classes:,} classes, {samples:,} samples: model {found['model_mb']:.0f} MB")
        for name in ("train", "evaluate", "report"):
            print(f"  {name:9} {found[name]['peak_mb']:7.0f} MB {found[name]['seconds']:7.1f} s")
        print(f"  page      {found['page_mb']:7.2f} MB", flush=True)
    write_figures(options.json, samples=samples, classes=figures, machine=machine("torch", "numpy"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
