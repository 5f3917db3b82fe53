"""Class imbalance on real images: one recipe, three sampling policies, recall of each class.

    python benchmarks/imbalance.py --cifar10 PARQUET [--quick] [--seeds N]
                                   [--json FILE] [--picture FILE]

PARQUET holds CIFAR-10 (Krizhevsky 2009) in the columns split (train, test), label and jpeg,
and the names of the classes in its metadata (class_names, separated by commas).

From it comes a long-tailed training set with the exponential profile of Cui et al. 2019,
"Class-Balanced Loss Based on Effective Number of Samples", section 5.1: class c keeps
n_max * imbalance^(-c / 9) images, rounded down, at imbalance 100. 200 images of each class
leave the training split first, to be a balanced validation split; so n_max is 4,800. The
test split stays whole. All of it goes through the command line: `bigbatch shard`,
`inspect`, and `train --nproc 2` once for each policy, with the same seed and the same
number of steps. Recall is that of the final weights on the test split.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from machine import benchmark_parser, lacks_cifar10, machine, write_figures

from bigbatch.trainers.monitoring.history import confused_pairs

POLICIES = ("uniform", "balanced", "label_shuffling")
IMBALANCE = 100.0
PROCESSES = 2
BIN = Path(sys.executable).parent

# output_stride 16 instead of 32: otherwise one pixel is left of a 32-pixel image at the end.
# A translation by an eighth is the usual crop after padding by 4 of 32 pixels.
RECIPE = """\
seed: {seed}
duration: {steps} steps
global_batch: 128
micro_batch: 64
data: {{path: longtail, image_size: 32, workers: 1, threads: 1, sampling: {policy}}}
model: {{name: test_resnet, options: {{output_stride: 16}}}}
optimizer: {{name: sgd, lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 5.0e-4}}
schedule: {{name: cosine, warmup: {warmup} steps}}
augment: {{flip: 0.5, affine: {{translate: 0.125}}}}
evaluate: {{every: {every} steps}}
checkpoint: {{every: {steps} steps}}
log: {{wandb: "off", every: 10}}
"""


@dataclass(frozen=True)
class Size:
    """How much is done: images of the largest class, of each class in val and test, steps."""

    largest: int
    val: int
    test: int
    steps: int


FULL = Size(largest=4800, val=200, test=1000, steps=940)
QUICK = Size(largest=480, val=20, test=100, steps=40)


def long_tail_counts(largest: int, classes: int, imbalance: float) -> npt.NDArray[np.int64]:
    """Images of each class, largest first: floor(largest * imbalance^(-c / (classes - 1)))."""
    exponents = np.arange(classes) / (classes - 1)
    # The epsilon keeps 5000 / 100 at 50, not 49.999999999.
    return np.floor(largest * imbalance**-exponents + 1e-6).astype(np.int64)


def write_long_tail(
    source: Path, dest: Path, *, train: Sequence[int], val: int, test: int
) -> dict[str, list[int]]:
    """Write `dest`, Parquet like `source`, with `train[c]`, `val` and `test` images of class c.

    val and train are disjoint parts of the source's training split. Which images are chosen
    follows from their bytes alone: those with the smallest SHA-256. Returns the counts of
    each class by split. Raises ValueError where a class has too few images.
    """
    table = pq.read_table(source)
    labels = table["label"].to_numpy()
    splits = table["split"].to_numpy().astype(str)
    digests = np.array([hashlib.sha256(image.as_py()).hexdigest() for image in table["jpeg"]])
    chosen: list[tuple[str, npt.NDArray[np.int64]]] = []
    for label, count in enumerate(train):
        parts = {"train": (("val", val), ("train", count)), "test": (("test", test),)}
        for origin, wanted in parts.items():
            rows = np.flatnonzero((labels == label) & (splits == origin))
            rows = rows[np.argsort(digests[rows], kind="stable")]
            needed = sum(n for _, n in wanted)
            if len(rows) < needed:
                raise ValueError(
                    f"class {label} has {len(rows)} images in {origin}, but {needed} are needed; "
                    "ask for fewer"
                )
            for name, n in wanted:
                chosen.append((name, rows[:n]))
                rows = rows[n:]
    kept = table.take(np.concatenate([rows for _, rows in chosen]))
    names = pa.array(np.repeat([name for name, _ in chosen], [len(rows) for _, rows in chosen]))
    kept = kept.set_column(kept.schema.get_field_index("split"), "split", names)
    pq.write_table(kept.replace_schema_metadata(table.schema.metadata), dest, row_group_size=2000)
    return {
        split: [
            sum(len(r) for s, r in chosen if s == split and labels[r[0]] == c)
            for c in range(len(train))
        ]
        for split in ("train", "val", "test")
    }


def run(folder: Path, *arguments: str, ok: tuple[int, ...] = (0,)) -> str:
    """Run `bigbatch ARGUMENTS` in `folder`; return what it printed, or stop with its error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(BIN / "bigbatch"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in ok:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def inspected(folder: Path, shards: str) -> dict[str, Any]:
    """`bigbatch inspect --verify --json`, without the path. It ends with 1 at problems."""
    found = json.loads(run(folder, "inspect", shards, "--verify", "--json", ok=(0, 1)))
    del found["root"]
    return dict(found)


def train(folder: Path, policy: str, seed: int, steps: int) -> dict[str, Any]:
    """Train with one policy; recall of each class, accuracy and NLL on the test split."""
    recipe = folder / f"{policy}-{seed}.yaml"
    recipe.write_text(
        RECIPE.format(
            seed=seed, steps=steps, policy=policy, warmup=max(1, steps // 20), every=steps // 4
        )
    )
    started = time.perf_counter()
    run(folder, "train", recipe.name, "--nproc", str(PROCESSES))
    seconds = time.perf_counter() - started
    result = folder / "runs" / recipe.stem
    table = json.loads((result / "ensemble" / "confusion.json").read_text())
    assert table["split"] == "test"
    matrix = np.zeros((len(table["classes"]), len(table["classes"])), np.int64)
    true, predicted, counts = confused_pairs(table).T
    matrix[true, predicted] = counts
    recall = matrix.diagonal() / matrix.sum(axis=1)
    summary = json.loads((result / "summary.json").read_text())
    assert summary["steps"] == steps
    return {
        "policy": policy,
        "seed": seed,
        "recall": recall.tolist(),
        "mean_recall": float(recall.mean()),
        "accuracy": summary["test"]["ensemble"]["accuracy"],
        "nll": summary["test"]["ensemble"]["nll"],
        "ece": summary["test"]["ensemble"]["ece"],
        "confusion": matrix.tolist(),
        "seconds": seconds,
    }


def markdown(classes: Sequence[str], counts: Sequence[int], runs: list[dict[str, Any]]) -> str:
    """The table: a row for each class, most frequent first, a column for each policy."""
    by_policy = {p: [r for r in runs if r["policy"] == p] for p in POLICIES}

    def row(name: str, count: str, values: Sequence[str]) -> str:
        return f"| {name} | {count} | {' | '.join(values)} |"

    def mean(key: str, policy: str) -> float:
        return float(np.mean([r[key] for r in by_policy[policy]]))

    recall = {p: np.mean([r["recall"] for r in by_policy[p]], axis=0) for p in POLICIES}
    lines = [row("class", "training images", POLICIES), "|---|---:|" + "---:|" * len(POLICIES)]
    for c in np.argsort(-np.array(counts), kind="stable"):
        shown = [f"{100 * recall[p][c]:.1f} %" for p in POLICIES]
        lines.append(row(classes[c], f"{counts[c]:,}", shown))
    shown = [f"{100 * mean('mean_recall', p):.1f} %" for p in POLICIES]
    lines.append(row("mean recall", f"{sum(counts):,}", shown))
    lines.append(row("accuracy", "", [f"{100 * mean('accuracy', p):.1f} %" for p in POLICIES]))
    lines.append(row("NLL", "", [f"{mean('nll', p):.3f}" for p in POLICIES]))
    return "\n".join(lines)


def draw(
    classes: Sequence[str], counts: Sequence[int], runs: list[dict[str, Any]], file: Path
) -> None:
    """Recall of each class by policy, most frequent class first; a dot for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    order = np.argsort(-np.array(counts), kind="stable")
    width = 0.8 / len(POLICIES)
    for number, (policy, color) in enumerate(
        zip(POLICIES, ("#999999", "#0072b2", "#e69f00"), strict=True)
    ):
        recalls = 100 * np.array([r["recall"] for r in runs if r["policy"] == policy])[:, order]
        places = np.arange(len(order)) + (number - (len(POLICIES) - 1) / 2) * width
        axes.bar(places, recalls.mean(axis=0), width, color=color, label=policy)
        if len(recalls) > 1:
            axes.plot(places, recalls.T, "k.", markersize=3)
    labels = [f"{classes[c]}\n{counts[c]:,}" for c in order]
    axes.set_xticks(range(len(order)), labels, fontsize=8)
    axes.set(xlabel="class and its training images", ylabel="recall on the test split, %")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, ncols=len(POLICIES), loc="upper right")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = benchmark_parser(__doc__, quick="a tenth of the images, few steps, no whole CIFAR-10")
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as Parquet")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each policy, from seed 0")
    parser.add_argument("--folder", type=Path, help="keep shards and runs in this new folder")
    parser.add_argument("--picture", type=Path, help="draw recall by class here: .png, .svg ...")
    options = parser.parse_args()
    if lacks_cifar10(parser, options.cifar10):
        return
    source, size = options.cifar10.resolve(), QUICK if options.quick else FULL
    if options.folder:
        options.folder.mkdir(parents=True)
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        inspections = {}
        if not options.quick:
            run(folder, "shard", str(source), "cifar10", "--json")
            inspections["cifar10"] = inspected(folder, "cifar10")
        wanted = long_tail_counts(size.largest, 10, IMBALANCE).tolist()
        counts = write_long_tail(
            source, folder / "longtail.parquet", train=wanted, val=size.val, test=size.test
        )
        run(folder, "shard", "longtail.parquet", "longtail", "--json")
        inspections["longtail"] = inspected(folder, "longtail")
        result: dict[str, Any] = {
            "machine": machine("bigbatch", "timm", "torch", "numpy", "pyarrow"),
            "quick": options.quick,
            "processes": PROCESSES,
            "imbalance": IMBALANCE,
            "classes": pq.read_schema(source).metadata[b"class_names"].decode().split(","),
            "counts": counts,
            "steps": size.steps,
            "recipe": RECIPE,
            "inspect": inspections,
            "runs": [],
        }
        # Written after each seed, so that a long measurement can be cut short.
        for seed in range(options.seeds):
            for policy in POLICIES:
                made = train(folder, policy, seed, size.steps)
                print(f"{policy}, seed {seed}: {made['seconds']:.0f} s", file=sys.stderr)
                result["runs"].append(made)
            write_figures(options.json, **result)
            if options.picture:
                draw(result["classes"], counts["train"], result["runs"], options.picture)
    print(markdown(result["classes"], counts["train"], result["runs"]))


if __name__ == "__main__":
    main()
