"""What each way of combining models buys on CIFAR-10, at equal numbers of training images.

    python benchmarks/ensembles.py --cifar10 PARQUET [--quick | --scarce] [--folder DIR]
                                   [--jobs N] [--report] [--json FILE]

PARQUET holds CIFAR-10 (Krizhevsky 2009) in the columns split (train, test), label and jpeg; a
tenth of the training split is held out for every decision, the test split only is reported.
--scarce takes a tenth of the training split, three times as often: there the network over-fits.

Arms, each from every seed, with the same network, optimizer, number of images and, but for swa and
swap, rate:

    single       one cosine cycle: the last weights
    ema          the same run: an exponential average, half-life a twentieth of it
    swa          a constant rate over the last quarter, the mean of each epoch's weights there
    snapshots    five cycles: the mean of their ends' probabilities; last, the last end alone
    soup         the same run: the greedy average of weights
    swap         half of the epochs or so (`trunk`) at a larger batch and a constant rate, then
                 three workers that share the rest at 256, each in an order of its own, whose
                 weights are averaged
    distilled    one cosine cycle, taught by the single runs of all seeds as one ensemble, whose
                 images are not counted
    patient      the same for three times as long, on mixed images and without their labels (Beyer
                 et al. 2022, arXiv:2106.05237)

and that ensemble, `independent`, of these seeds and of two more, which costs their sum.

Every run is one of bigbatch's own commands in DIR, and is left alone once it is finished, so the
same command goes on where it was stopped. --report runs nothing, and reports what is there.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from large_batch import BIN, write_shards
from large_batch import PLANS as LARGE_BATCH
from machine import benchmark_parser, lacks_cifar10, machine, write_figures

CYCLES = 5
TEACHER = "ensembles/independent"
SWAP_START = 4  # the workers' first rate is the trunk's divided by this, as their batch is


@dataclass(frozen=True)
class Plan:
    """How much is done. `images` to train on, `tests` to report on; None is all of them."""

    epochs: int = 20
    seeds: tuple[int, ...] = (1, 2, 3)
    image_size: int = 16
    global_batch: int = 256
    lr: float = 0.2
    images: int | None = None
    tests: int | None = None
    more: tuple[int, ...] = (4, 5)  # seeds of single runs alone
    trunk: int = 11  # epochs; the rest of the budget is the workers'
    trunk_batch: int = 1024
    workers: int = 3

    @property
    def end(self) -> int:
        """The epoch at which workers end, so that trunk and workers together cost `epochs`."""
        return self.trunk + (self.epochs - self.trunk) // self.workers


PLANS = {
    "full": Plan(),
    "scarce": Plan(60, images=4500, tests=10_000, trunk=33, trunk_batch=512),
    "quick": Plan(5, (1,), images=2560, more=(2,), trunk=2, trunk_batch=512),
}
RUNS = ("swa", "snapshots", "swap", "distilled", "patient")  # beside single, which teaches


def recipe(plan: Plan, kind: str, seed: int) -> dict[str, Any]:
    """The recipe of a run, as YAML would give it."""
    whole = f"{plan.epochs} epochs"
    tree: dict[str, Any] = {
        "name": f"{kind}-{seed}",
        "seed": seed,
        "duration": whole,
        "global_batch": plan.global_batch,
        "micro_batch": plan.global_batch,
        "data": {"path": "shards", "image_size": plan.image_size, "workers": 0, "threads": 1},
        "model": LARGE_BATCH["cpu"].model,
        "optimizer": {
            "name": "sgd", "lr": plan.lr, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
        },
        "schedule": {"name": "cosine", "warmup": "1 epochs", "warmup_start": 0.1},
        "augment": {"flip": 0.5, "affine": {"translate": 0.125}},
        "evaluate": {"every": whole, "precise_bn_images": 8192},
        "checkpoint": {"every": "5 epochs", "keep": 1},
        "log": {"wandb": "off", "every": 100},
    }  # fmt: skip
    match kind:
        case "single":
            tree["average"] = {"name": "ema", "half_life": f"{plan.epochs / 20:g} epochs"}
        case "swa":
            start = f"{plan.epochs * 3 / 4:g} epochs"
            flat = {"name": "constant", "warmup": "1 epochs", "warmup_start": 0.1}
            tree["schedule"] = flat
            tree["optimizer"]["lr"] = plan.lr / 4
            tree["average"] = {"name": "swa", "start": start, "every": "1 epochs"}
        case "snapshots":
            tree["schedule"] = {"name": "cycles", "cycles": CYCLES, "warmup": "0.5 epochs"}
        case "swap":
            tree["duration"] = f"{plan.trunk} epochs"
            tree["global_batch"] = plan.trunk_batch
            tree["schedule"] = {"name": "constant", "warmup": "1 epochs", "warmup_start": 0.1}
            tree["checkpoint"] = {"every": f"{plan.trunk} epochs", "keep": 1}
        case "distilled":
            tree["distill"] = {"teacher": TEACHER, "cache_gb": 0}
        case "patient":
            tree["duration"] = tree["evaluate"]["every"] = f"{3 * plan.epochs} epochs"
            tree["distill"] = {"teacher": TEACHER, "cache_gb": 0, "temperature": 1, "weight": 1}
            tree["augment"]["mixup"] = 1.0
    return tree


def bigbatch(folder: Path, *arguments: str) -> str:
    command = [str(BIN / "bigbatch"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def run(plan: Plan, kind: str, seed: int, folder: Path) -> None:
    """Train, or go on training; nothing where it is finished."""
    name = f"{kind}-{seed}"
    path = folder / "runs" / name
    if (path / "summary.json").exists():
        return
    if (path / "recipe.yaml").exists():
        bigbatch(folder, "resume", f"runs/{name}", "--nproc", "1")
    else:
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe(plan, kind, seed)))
        bigbatch(folder, "train", file.name, "--run", name, "--nproc", "1")
    print(f"{name} is finished", file=sys.stderr, flush=True)


def worker_changes(plan: Plan) -> list[str]:
    """What SWAP's workers change of their trunk: a cosine to 0, of which they see the end."""
    left = (1 + math.cos(math.pi * plan.trunk / plan.end)) / 2
    return [
        f"global_batch={plan.global_batch}",
        f"duration={plan.end} epochs",
        "schedule={name: cosine, warmup: 0 steps}",
        f"optimizer.lr={plan.lr / SWAP_START / left:.4g}",
    ]


def average_workers(plan: Plan, seed: int, folder: Path) -> None:
    """SWAP behind its trunk."""
    if (folder / f"ensembles/swap-{seed}").exists():
        return
    count = str(plan.workers)
    options = ["--members", count, "--run", f"worker-{seed}", "--nproc", "1", *worker_changes(plan)]
    bigbatch(folder, "fork", f"runs/swap-{seed}", *options)
    workers = [f"runs/worker-{seed}-{k}" for k in range(plan.workers)]
    out = ["--soup", "uniform", "--out", f"ensembles/swap-{seed}", "--nproc", "1"]
    bigbatch(folder, "ensemble", *workers, *out)


def seed_runs(plan: Plan, seed: int, kinds: Sequence[str], folder: Path) -> None:
    for kind in kinds:
        run(plan, kind, seed, folder)
        if kind == "swap":
            average_workers(plan, seed, folder)


def run_all(plan: Plan, jobs: int, folder: Path) -> None:
    """Single runs first: their ensemble teaches."""

    def each(seeds: Sequence[int], kinds: Sequence[str]) -> None:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda seed: seed_runs(plan, seed, kinds, folder), seeds))

    each((*plan.seeds, *plan.more), ["single"])
    if not (folder / TEACHER).exists():
        runs = [f"runs/single-{seed}" for seed in plan.seeds]
        bigbatch(folder, "ensemble", *runs, "--out", TEACHER, "--nproc", "1")
    each(plan.seeds, RUNS)


def arms_of(plan: Plan, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Test scores of every arm, one for each seed whose runs are there."""
    arms: dict[str, list[dict[str, float]]] = {}

    def note(arm: str, summary: dict[str, Any], name: str) -> None:
        found = summary["test"].get(name)
        if found is not None:
            arms.setdefault(arm, []).append({k: found[k] for k in ("accuracy", "nll", "ece")})

    for seed in plan.seeds:
        if (folder / f"ensembles/swap-{seed}").exists():
            out = ["--out", f"evaluations/swap-{seed}", "--json", "--nproc", "1"]
            text = bigbatch(folder, "evaluate", f"ensembles/swap-{seed}", *out)
            found = json.loads(text)
            found |= found["before_temperature"] or {}  # no other arm has one
            note("swap", {"test": {"swap": found}}, "swap")
        for kind in ("single", *RUNS):
            path = folder / "runs" / f"{kind}-{seed}" / "summary.json"
            if not path.exists():
                continue
            summary = json.loads(path.read_text())
            last = {"test": {"last": summary["test"]["members"][-1]}}
            match kind:
                case "single":
                    note("single", last, "last")
                    note("ema", summary, "ema")
                case "swa":
                    note("swa", summary, "swa")
                case "snapshots":
                    note("snapshots, last", last, "last")
                    note("snapshots", summary, "ensemble")
                    note("soup", summary, "soup")
                case "distilled" | "patient":
                    note(kind, last, "last")
    return arms


def independent(seeds: Sequence[int], folder: Path) -> dict[str, Any] | None:
    """The single runs of these seeds as one ensemble; None where one is not there."""
    runs = [f"runs/single-{seed}" for seed in seeds]
    if not all((folder / run / "summary.json").exists() for run in runs):
        return None
    options = ["--out", f"evaluations/independent-{len(runs)}", "--json", "--nproc", "1"]
    found = json.loads(bigbatch(folder, "evaluate", *runs, *options))
    keys = ("accuracy", "accuracy_interval", "nll", "ece", "samples")
    pair = found["members"]["against_best"]
    return {key: found[key] for key in keys} | {"against_best": pair, "runs": len(runs)}


def table(arms: dict[str, list[dict[str, float]]]) -> str:
    lines = [f"{'arm':18}{'seeds':>6}{'accuracy':>10}{'range':>16}{'nll':>8}{'ece':>8}"]
    for name, found in arms.items():
        accuracy = [100 * f["accuracy"] for f in found]
        means = [statistics.mean(f[key] for f in found) for key in ("nll", "ece")]
        span = f"{min(accuracy):.2f} - {max(accuracy):.2f}"
        lines.append(
            f"{name:18}{len(found):6}{statistics.mean(accuracy):10.2f}{span:>16}"
            f"{means[0]:8.4f}{means[1]:8.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = benchmark_parser(__doc__, quick="few images, five epochs, one seed")
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as Parquet")
    parser.add_argument("--scarce", action="store_true", help="few images, often")
    parser.add_argument("--report", action="store_true", help="run nothing; needs --folder")
    parser.add_argument("--folder", type=Path, help="keep shards and runs here, and go on there")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    options = parser.parse_args()
    if lacks_cifar10(parser, options.cifar10):
        return
    if options.report and not options.folder:
        parser.error("--report reads the runs in --folder; name it")
    if options.quick and options.scarce:
        parser.error("--quick and --scarce are two scales; give one of them")
    plan = PLANS["quick" if options.quick else "scarce" if options.scarce else "full"]
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        write_shards(options.cifar10.resolve(), folder, plan.images, plan.tests)
        if not options.report:
            run_all(plan, options.jobs, folder)
        arms = arms_of(plan, folder)
        several = (plan.seeds, (*plan.seeds, *plan.more))
        together = [independent(s, folder) for s in several if len(s) > 1]
    print(table(arms))
    together = [found for found in together if found is not None]
    for found in together:
        print(f"independent, {found['runs']} runs: {100 * found['accuracy']:.2f}")
    write_figures(
        options.json,
        machine=machine("bigbatch", "timm", "torch", "numpy"),
        plan=asdict(plan),
        recipes={kind: recipe(plan, kind, 1) for kind in ("single", *RUNS)},
        workers=worker_changes(plan),
        arms=arms,
        independent=together,
    )


if __name__ == "__main__":
    main()
