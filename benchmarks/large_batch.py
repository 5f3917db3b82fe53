"""What large batches cost in accuracy: Nesterov, LARS, LAMB and Muon, each tuned, on CIFAR-10.

    python benchmarks/large_batch.py --cifar10 PARQUET [--quick | --gpu] [--epochs N]
                                     [--folder DIR] [--arms NAME,...] [--batches N,...]
                                     [--rates FACTOR,...] [--report] [--json FILE]
                                     [--picture FILE] [--jobs N]

PARQUET holds CIFAR-10 (Krizhevsky 2009) in the columns split (train, test), label and jpeg.

Every arm (optimizer x batch size) sees the same number of images and gets the same number of
learning rates to try, a log grid whose centre grows with a power of the batch: the square root,
but for Muon, whose steps have a length of their own. The rate with the best accuracy on the
validation split (5,000 images of the training split) is then trained anew from three other
seeds, and those runs alone give the test accuracy. All other settings of an optimizer are fixed,
the same at every batch size; `lamb_short` has betas for few steps, `muon_linear` no warmup and a
rate that falls linearly, where the others have a cosine; `muon_stages` is the same with a batch
that begins at 256 and is four times as large after 10, 30 and 60 % of the run, while that is less
than the arm's own, which comes last; `muon_stages_late` after 20, 50 and 80 %. A run that
does not stay finite counts as a trial. Nado et al. 2021 (arXiv:2102.06356) is why the Nesterov arm
is tuned as well as the others are.

Accuracies are with precise BatchNorm (docs/large-batch.md), which changes no weight. Those of the
same weights with the statistics of training are noted beside them, as val_running, test_running:
what it gains needs no runs of its own.

Each trial is a run of bigbatch's own trainer from a recipe of its own, under DIR/runs. It is
noted in DIR/trials.jsonl once finished, so the same command goes on where it was stopped, also
inside a trial, and with other --epochs, --arms or --batches adds theirs. --report runs nothing
and reports what is noted there already. On a CPU: a small residual net and few epochs, one trial
per core; --gpu: ResNet-18 and 30 epochs.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from large_batch_report import arms_of, draw, markdown, tuning_table
from machine import benchmark_parser, lacks_cifar10, machine, write_figures
from trials import noted, open_pool, run_all, train

BIN = Path(sys.executable).parent
BASE_BATCH = 256


@dataclass(frozen=True)
class Arm:
    """An optimizer: what is fixed, and the rates to try: those of the plan times `centre`."""

    fixed: dict[str, Any]
    centre: float  # at BASE_BATCH
    growth: float = 0.5  # the power of the batch that it grows with
    rest: float | None = None  # of Muon: the second rate over the first
    schedule: dict[str, Any] | None = None  # instead of a cosine with warmup
    # Shares of the run after which a batch that begins at BASE_BATCH is four times as large.
    stages: tuple[float, ...] = ()


_LAMB = {"name": "lamb", "weight_decay": 0.02}
_SHORT = {**_LAMB, "betas": [0.8, 0.95]}
# No warmup: that takes a sixth of the steps, of which there are 9 to 33 in a large batch's run.
_MUON = Arm(
    {"name": "muon", "momentum": 0.6, "rest": _SHORT},
    0.033,
    0.25,
    rest=0.2,
    schedule={"name": "polynomial", "power": 1.0},
)
OPTIMIZERS: dict[str, Arm] = {
    "nesterov": Arm(
        {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 5.0e-4}, 0.2
    ),
    "lars": Arm({"name": "lars", "momentum": 0.9, "weight_decay": 5.0e-4}, 4.0),
    "lamb": Arm(_LAMB, 0.008),
    "lamb_short": Arm(_SHORT, 0.008),
    "muon": replace(_MUON, centre=0.05, schedule=None),
    "muon_linear": _MUON,
    "muon_stages": replace(_MUON, stages=(0.1, 0.3, 0.6)),
    "muon_stages_late": replace(_MUON, stages=(0.2, 0.5, 0.8)),
}


@dataclass(frozen=True)
class Plan:
    """How much is done. `images` of the training split; None is all of them."""

    model: dict[str, Any]
    batches: tuple[int, ...]
    micro_batch: int
    epochs: int
    rates: tuple[float, ...]  # factors of the centre
    seeds: tuple[int, ...]
    precision: str
    image_size: int
    augment: dict[str, Any]
    workers: int = 0  # decoding processes of a trial
    images: int | None = None
    arms: tuple[str, ...] = tuple(OPTIMIZERS)


# A ResNet with one basic block in each stage and a narrow stem: 0.3 M parameters.
_SMALL = {
    "name": "resnet18",
    "options": {
        "layers": [1, 1, 1, 1],
        "channels": [16, 32, 64, 128],
        "stem_type": "deep",
        "stem_width": 8,
    },
}
_RATES = (1 / 3, 1.0, 3.0, 9.0)
PLANS = {
    "cpu": Plan(
        _SMALL, (256, 1024, 4096, 16384), 256, 3, _RATES, (1, 2, 3), "fp32", 16, {"flip": 0.5}
    ),
    "gpu": Plan(
        {"name": "resnet18", "stem": "small"},
        (256, 1024, 4096, 16384),
        256,
        30,
        (1 / 9, 1 / 3, 1.0, 3.0, 9.0),
        (1, 2, 3),
        "bf16",
        32,
        {"flip": 0.5, "affine": {"translate": 0.125}},
        workers=8,
    ),
    "quick": Plan(
        _SMALL, (128, 512), 64, 2, (1.0, 3.0), (1,), "fp32", 16, {"flip": 0.5}, images=2560
    ),
}


@dataclass(frozen=True)
class Trial:
    """One run. Its name says what it is, and is the name of its run directory."""

    optimizer: str
    batch: int
    lr: float
    seed: int
    epochs: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.batch}-{self.lr:g}-seed{self.seed}-epochs{self.epochs}"


def tuning_trials(plan: Plan) -> list[Trial]:
    """Every arm with every rate, from seed 0; rates rounded to two digits."""

    def rate(arm: Arm, factor: float, batch: int) -> float:
        return float(f"{arm.centre * factor * (batch / BASE_BATCH) ** arm.growth:.2g}")

    return [
        Trial(name, batch, rate(OPTIMIZERS[name], factor, batch), 0, plan.epochs)
        for factor in plan.rates
        for batch in plan.batches
        for name in plan.arms
        if batch > BASE_BATCH or not OPTIMIZERS[name].stages
    ]


def batch_of(trial: Trial) -> int | dict[str, Any]:
    """The recipe's global_batch."""
    stages = OPTIMIZERS[trial.optimizer].stages
    if not stages:
        return trial.batch
    pieces: list[dict[str, Any]] = []
    batch = BASE_BATCH
    for share in stages:
        if batch < trial.batch:
            pieces.append({"batch": batch, "until": f"{share * trial.epochs:g} epochs"})
            batch *= 4
    return {"name": "stages", "pieces": [*pieces, {"batch": trial.batch}]}


def recipe_tree(plan: Plan, trial: Trial, shards: Path) -> dict[str, Any]:
    """The recipe of a trial, as YAML would give it."""
    whole = f"{plan.epochs} epochs"
    arm = OPTIMIZERS[trial.optimizer]
    optimizer = {**arm.fixed, "lr": trial.lr}
    if arm.rest is not None:
        optimizer["rest"] = {**arm.fixed["rest"], "lr": arm.rest * trial.lr}
    return {
        "name": trial.name,
        "seed": trial.seed,
        "duration": whole,
        "global_batch": batch_of(trial),
        "micro_batch": plan.micro_batch,
        "precision": plan.precision,
        "data": {
            "path": str(shards),
            "image_size": plan.image_size,
            "workers": plan.workers,
            "threads": 1,
        },
        "model": plan.model,
        "optimizer": optimizer,
        "schedule": arm.schedule
        or {"name": "cosine", "warmup": f"{plan.epochs / 6:g} epochs", "warmup_start": 0.1},
        "augment": plan.augment,
        "evaluate": {"every": whole, "precise_bn": "always", "precise_bn_images": 8192},
        "checkpoint": {"every": "1 epochs", "keep": 1},
        "log": {"wandb": "off", "every": 100},
    }


def run_trial(plan: Plan, trial: Trial, folder: Path) -> dict[str, Any]:
    """Train, or go on training, in this process; accuracies are None where it diverged."""
    run, summary = train(trial.name, recipe_tree(plan, trial, folder / "shards"), folder)
    result: dict[str, Any] = {**asdict(trial), "val": None, "test": None, "seconds": None}
    if summary is not None:
        result |= {split: summary[split]["ensemble"]["accuracy"] for split in ("val", "test")}
        result |= {"seconds": summary["seconds"], "steps": summary["steps"]}
        result |= with_running_statistics(run)
    return result


def with_running_statistics(run: Any) -> dict[str, float]:
    """Accuracies of a finished run's weights with the statistics that training blended in."""
    import torch
    from safetensors.torch import load_file

    from bigbatch.trainers.engine import open_engine
    from bigbatch.trainers.ensemble.members import find_members
    from bigbatch.trainers.evaluation.evaluate import Evaluator, autocast
    from bigbatch.trainers.models.build import build_augmenter
    from bigbatch.trainers.planning.inputs import open_split
    from bigbatch.trainers.recovery.stored import STATISTICS, list_checkpoints

    (member,) = find_members(run)
    engine, recipe = open_engine("ddp", "fp32"), member.recipe
    model = member.build(engine.device)
    own = load_file(list_checkpoints(run.checkpoints)[0] / STATISTICS)
    model.load_state_dict(own, strict=False)
    evaluator = Evaluator(
        engine, build_augmenter(recipe, len(member.classes), engine.device), recipe
    )
    found = {}
    for role in ("val", "test"):
        split = open_split(recipe.data, getattr(recipe.data, role))
        with autocast(engine.device, recipe.precision):
            logits = evaluator.logits(model, split)
        assert logits is not None
        right = torch.from_numpy(logits).argmax(1).numpy() == split.label
        found[f"{role}_running"] = float(right.mean())
    return found


def trials_done(folder: Path) -> dict[Trial, dict[str, Any]]:
    """The results in trials.jsonl."""
    return {
        Trial(r["optimizer"], r["batch"], r["lr"], r["seed"], r["epochs"]): r for r in noted(folder)
    }


def best_rates(tuning: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """The rate of each arm with the best validation accuracy; arms that diverged are left out."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for r in tuning:
        arm = r["optimizer"], r["batch"]
        if r["val"] is not None and (arm not in best or r["val"] > best[arm]["val"]):
            best[arm] = r
    return {arm: r["lr"] for arm, r in best.items()}


def write_shards(source: Path, folder: Path, images: int | None, tests: int | None = None) -> None:
    """Shards of all of CIFAR-10, or of about `images`, and of `tests`: a fifth as many by default.

    Of the images of the training split a tenth more is taken, which becomes the validation split.
    """
    if (folder / "shards").exists():
        return
    assert tests is None or images is not None
    if images is not None:
        tests = tests or images // 5
        table = pq.read_table(source)
        splits = table["split"].to_numpy().astype(str)
        train, test = (np.flatnonzero(splits == name) for name in ("train", "test"))
        # Evenly spread, since the rows may be sorted by class.
        rows = np.concatenate(
            [train[:: len(train) // (images * 10 // 9)], test[:: len(test) // tests]]
        )
        source = folder / "part.parquet"
        pq.write_table(table.take(pa.array(rows)), source)
    command = [str(BIN / "bigbatch"), "shard", str(source), str(folder / "shards"), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = benchmark_parser(__doc__, quick="few images, two batch sizes")
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as Parquet")
    parser.add_argument("--gpu", action="store_true", help="ResNet-18 and 30 epochs")
    parser.add_argument("--report", action="store_true", help="run nothing; needs --folder")
    parser.add_argument("--folder", type=Path, help="keep shards and runs here, and go on there")
    parser.add_argument("--epochs", type=int, help="another length of every run")
    parser.add_argument("--arms", help="some optimizers instead, such as lamb,muon")
    parser.add_argument("--batches", help="some batch sizes instead, such as 1024,4096")
    parser.add_argument("--rates", help="some rates instead, as factors of each arm's centre")
    parser.add_argument("--jobs", type=int, help="trials at a time")
    parser.add_argument("--picture", type=Path, help="draw them here: .png, .svg ...")
    options = parser.parse_args()
    if lacks_cifar10(parser, options.cifar10):
        return
    if options.quick and options.gpu:
        parser.error("--quick and --gpu are two scales; give one of them")
    if options.report and not options.folder:
        parser.error("--report reads the trials noted in --folder; name it")
    name = "quick" if options.quick else "gpu" if options.gpu else "cpu"
    plan = PLANS[name]
    plan = replace(plan, epochs=options.epochs or plan.epochs)
    if options.arms:
        plan = replace(plan, arms=tuple(arm.strip() for arm in options.arms.split(",")))
        if unknown := set(plan.arms) - OPTIMIZERS.keys():
            parser.error(f"--arms {', '.join(unknown)}: choose of {', '.join(OPTIMIZERS)}")
    if options.batches:
        plan = replace(plan, batches=tuple(int(batch) for batch in options.batches.split(",")))
    if options.rates:
        plan = replace(plan, rates=tuple(float(rate) for rate in options.rates.split(",")))
    jobs = options.jobs or (1 if name == "gpu" else os.cpu_count() or 1)
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        write_shards(options.cifar10.resolve(), folder, plan.images)
        threads = 1 if name != "gpu" else (os.cpu_count() or 1)
        pool = None if options.report else open_pool(folder, jobs, threads)
        work, done = partial(run_trial, plan, folder=folder), trials_done(folder)
        with pool or nullcontext():
            tuning = run_all(pool, work, tuning_trials(plan), done, folder)
            best = best_rates(tuning)
            finals: list[dict[str, Any]] = []
            # Seed by seed, and written after each, so that a long measurement can be cut short.
            for seed in (None, *plan.seeds):
                if seed is not None:
                    trials = [Trial(o, b, lr, seed, plan.epochs) for (o, b), lr in best.items()]
                    finals += run_all(pool, work, trials, done, folder)
                arms = arms_of(finals)
                result = {
                    "machine": machine("bigbatch", "timm", "torch", "numpy"),
                    "scale": name,
                    "plan": asdict(plan),
                    "recipe": recipe_tree(plan, tuning_trials(plan)[0], Path("shards")),
                    "optimizers": {arm: asdict(OPTIMIZERS[arm]) for arm in plan.arms},
                    "arms": [{"optimizer": o, "batch": b, **a} for (o, b), a in arms.items()],
                    "tuning": tuning,
                    "finals": finals,
                }
                write_figures(options.json, **result)
                if options.picture:
                    draw(result, options.picture)
    print(tuning_table(result))
    print()
    print(markdown(result))


if __name__ == "__main__":
    main()
