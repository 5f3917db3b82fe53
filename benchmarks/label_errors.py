"""Planted label errors, found again by what a run records of its samples.

    python benchmarks/label_errors.py --cifar10 PARQUET|--digits [--quick] [--epochs N] [--nproc N]
                                      [--mixup ALPHA] [--retrain] [--folder DIR] [--json FILE]

PARQUET holds CIFAR-10 (Krizhevsky 2009) in the columns split (train, test), label and jpeg; with
`--digits` scikit-learn's 1,797 digits are in its place, a fifth of them to test. Of the training
images 10 % get another label, drawn evenly from the nine others; which ones, and which labels,
follows from a seed. A small network is trained on them once, with `log.samples=true`, and
`bigbatch samples` ranks them: `by_epoch` by what was recorded up to an epoch's end, `clean` with
`--clean`, by the weights after each epoch up to there. With `--mixup` records are of mixtures.

Of each score the area under the ROC curve is that of planted errors against all other samples: the
share of such pairs that it puts right, ties counted half. (CIFAR-10 has some errors of its own,
which count as mistakes here.) With `--retrain` the weights that `--weights` writes are then trained
with, from the same seed and for as many steps; runs are scored on the test images, whose labels
stay as they are. Shards and runs that are in DIR already are taken as they are.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from machine import benchmark_parser, machine, write_figures

from bigbatch.data.rng import uniforms

SHARE = 0.1
CLASSES = 10
RECIPE = """\
seed: 0
duration: {epochs} epochs
global_batch: 256
micro_batch: 256
reduction: exact
data: {{path: shards, image_size: {size}, workers: 0, threads: 1, test: null}}
model:
  name: resnet18
  options: {{layers: [1, 1, 1, 1], channels: [16, 32, 64, 128], stem_type: deep, stem_width: 8}}
optimizer:
  name: muon
  lr: 0.1
  momentum: 0.6
  rest: {{name: lamb, lr: 0.02, weight_decay: 0.02, betas: [0.8, 0.95]}}
schedule: {{name: cosine, warmup: 0.5 epochs}}
augment: {{flip: 0.5, mixup: {mixup}}}
evaluate: {{every: 1 epochs}}
checkpoint: {{every: 1 epochs, keep_every: 1 epochs}}
log: {{wandb: "off", every: 10, samples: true}}
"""
# Column of the table, and whether errors have high values of it.
SCORES = {
    "margin": False,
    "confidence": False,
    "right": False,
    "loss": True,
    "variability": True,
    "forgotten": True,
}


def plant(source: Path, dest: Path, images: int | None) -> npt.NDArray[np.int64]:
    """Write `dest` with wrong labels, and return their rows: the keys of their samples."""
    table = pq.read_table(source)
    splits = table["split"].to_numpy().astype(str)
    found = [np.flatnonzero(splits == name) for name in ("train", "test")]
    # Evenly spread, since the rows may be sorted by class.
    rows = np.concatenate([own[:: len(own) // images if images else 1] for own in found])
    table, splits = table.take(rows), splits[rows]
    labels = table["label"].to_numpy().copy()
    train = np.flatnonzero(splits == "train")
    drawn = np.argsort(uniforms((len(train),), 0, "which"), kind="stable")
    wrong = np.sort(train[drawn[: round(SHARE * len(train))]])
    shift = 1 + (uniforms((len(wrong),), 0, "label") * (CLASSES - 1)).astype(labels.dtype)
    labels[wrong] = (labels[wrong] + shift) % CLASSES
    columns = {
        "split": pa.array(np.where(splits == "train", "train", "val")),
        "label": pa.array(labels, table.schema.field("label").type),
    }
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    names = pq.read_schema(source).metadata
    pq.write_table(table.replace_schema_metadata(names), dest, row_group_size=2000)
    return wrong


def write_digits(path: Path) -> None:
    """Scikit-learn's digits, at 32 pixels, as the Parquet of CIFAR-10 would have them."""
    import sklearn.datasets
    from PIL import Image

    data = sklearn.datasets.load_digits()
    files = []
    for image in np.kron(data.images * 15.9, np.ones((4, 4))).astype(np.uint8):
        content = io.BytesIO()
        Image.fromarray(image).convert("RGB").save(content, "JPEG", quality=95)
        files.append(content.getvalue())
    split = np.where(uniforms((len(files),), 0, "split") < 0.8, "train", "test")
    table = {"split": pa.array(split), "label": pa.array(data.target, pa.int64()), "jpeg": files}
    pq.write_table(pa.table(table), path)


def roc_area(scores: npt.NDArray[np.float64], planted: npt.NDArray[np.bool_]) -> float:
    """The chance that a planted one has the larger score of a pair, ties counted half."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[place]  # the mean rank of equals
    n, m = int(planted.sum()), int((~planted).sum())
    return float((ranks[planted].sum() - n * (n + 1) / 2) / (n * m))


def areas(table: dict[str, npt.NDArray[Any]], planted: npt.NDArray[np.bool_]) -> dict[str, float]:
    found = {}
    for name, high in SCORES.items():
        values = table[name].astype(np.float64)
        found[name] = round(roc_area(values if high else -values, planted), 4)
    return found


def bigbatch(folder: Path, *arguments: str) -> str:
    """What a command prints, or the end with its error."""
    command = [sys.executable, "-m", "bigbatch.launcher.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def train(folder: Path, name: str, nproc: int, *changes: str) -> float:
    """Accuracy on the validation split, whose labels are right."""
    summary = folder / "runs" / name / "summary.json"
    if not summary.exists():
        started = time.perf_counter()
        more = ("--nproc", str(nproc), "--run", name)
        bigbatch(folder, "train", "recipe.yaml", *changes, *more)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return float(json.loads(summary.read_text())["val"]["ensemble"]["accuracy"])


def studied(folder: Path, planted: set[str], until: int | None, *how: str) -> dict[str, Any]:
    """Areas under the ROC curve, of all visits or of those up to a step; `how` is an option."""
    out = f"samples-{until or 'all'}{''.join(how)}"
    more = how if until is None else (*how, "--until", str(until))
    if not (folder / out).exists():
        bigbatch(folder, "samples", "errors", "--out", out, "--json", *more)
    columns = pq.read_table(folder / out / "samples.parquet").to_pydict()
    table = {name: np.array(values) for name, values in columns.items()}
    wrong = np.isin(table["key"], list(planted))
    first = table["rank"] <= len(planted)
    return {
        "step": until,
        "areas": areas(table, wrong),
        "right_of_first": round(float(wrong[first].mean()), 4),  # as many as were planted
    }


def main() -> None:
    parser = benchmark_parser(__doc__, quick="2,000 images, two epochs")
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as Parquet")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=16, help="pixels of a side")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--mixup", type=float, default=0, help="augment.mixup of the run")
    parser.add_argument("--retrain", action="store_true", help="train on what was found, too")
    parser.add_argument("--folder", type=Path, help="keep shards, runs and pages here")
    options = parser.parse_args()
    if options.cifar10 is None and not options.digits:
        print("skipped: give CIFAR-10 as Parquet by --cifar10, or --digits")
        return
    if options.cifar10 is not None and not options.cifar10.is_file():
        parser.error(f"{options.cifar10} is no file; give CIFAR-10 as Parquet")
    epochs = 2 if options.quick else options.epochs
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        source = folder / "digits.parquet" if options.digits else options.cifar10.resolve()
        if options.digits:
            write_digits(source)
        wrong = plant(source, folder / "planted.parquet", 2000 if options.quick else None)
        if not (folder / "shards").exists():
            bigbatch(folder, "shard", "planted.parquet", "shards", "--json")
        recipe = RECIPE.format(epochs=epochs, size=options.size, mixup=options.mixup)
        (folder / "recipe.yaml").write_text(recipe)
        keys = pq.read_table(folder / "shards/train/index/keys.parquet")["key"].to_pylist()
        planted = {key for key in keys if int(key) in set(wrong.tolist())}
        assert len(planted) == len(wrong)
        accuracy = train(folder, "errors", options.nproc)
        records = [json.loads(x) for x in (folder / "runs/errors/metrics.jsonl").open()]
        ends = [r["step"] for r in records if r["kind"] == "eval" and r["split"] == "val"]
        found = [studied(folder, planted, step) for step in (*ends[:-1], None)]
        clean = [studied(folder, planted, step, "--clean") for step in (*ends[:-1], None)]
        for row in (*found, *clean):
            print(json.dumps(row), file=sys.stderr)
        again = None
        if options.retrain:
            chosen = ("--weights", "weights.parquet", "--drop", str(SHARE))
            bigbatch(folder, "samples", "errors", *chosen)
            again = train(
                folder,
                "weighted",
                options.nproc,
                "data.sampling={name: weights, file: weights.parquet}",
                f"duration={ends[-1]} steps",
                "log.samples=false",
            )
        result = {
            "machine": machine("bigbatch", "timm", "torch", "numpy"),
            "quick": options.quick,
            "recipe": recipe,
            "images": len(keys),
            "planted": len(wrong),
            "by_epoch": found,
            "clean": clean,
            "accuracy": accuracy,
            "accuracy_retrained": again,
        }
        write_figures(options.json, **result)
        print(json.dumps({k: v for k, v in result.items() if k not in ("machine", "recipe")}))


if __name__ == "__main__":
    main()
