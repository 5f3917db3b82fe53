"""What each family of the craft's options buys on CIFAR-10, and the best of them together.

    python benchmarks/craft.py --cifar10 PARQUET [--quick] [--folder DIR] [--jobs N] [--report]
                               [--arms NAME,...] [--json FILE]

PARQUET holds CIFAR-10 (Krizhevsky 2009) in the columns split (train, test), label and jpeg. Of
each class the first 500 images of the training split are trained on and the next 500 are the
validation split, by which all is decided. The test split, all of it, is only reported.

Every trial is a run of bigbatch's own trainer from a recipe of its own: the same network, number
of images and cosine. The baseline is cross-entropy, SGD with Nesterov's momentum and mirrored
images; its rate is the best of a grid by validation, from seed 0. Then:

1. each arm changes one thing, with usual values that nobody tuned and with the baseline's rate;
2. combinations of them are tried; that with the best validation accuracy is the best one.

The first seed decides. The best combination is then trained from three others, which alone are
reported: what chose it was lucky, too. The other seeds of the baseline and the arms come last.

Averaged weights (ema) are those of the same runs; mirrored looks at evaluation are
`bigbatch evaluate --tta flip` of the baseline's runs and the combination's.

Each trial is noted in DIR/trials.jsonl once finished, so the same command goes on where it was
stopped, also inside a trial. --report runs nothing and reports what is noted there already.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from craft_report import markdown, rows_of
from large_batch import PLANS as LARGE_BATCH
from large_batch import write_shards
from machine import benchmark_parser, lacks_cifar10, machine, write_figures
from trials import noted, open_pool, run_all, train


@dataclass(frozen=True)
class Plan:
    """How much is done; images are those of each class."""

    images: int = 500
    val: int = 500
    test: int = 1000
    epochs: int = 16
    batch: int = 128
    image_size: int = 24
    rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    seeds: tuple[int, ...] = (1, 2, 3)
    fresh: tuple[int, ...] = (2, 3, 4)  # of the best combination, which seed 1 chose
    arms: tuple[str, ...] = ()  # none: all
    before: int = 7  # so many arms come before the combinations
    # Muon alone fits the training images best by far, and so is what the others are put on.
    combinations: tuple[tuple[str, ...], ...] = (
        ("translate", "muon", "se"),
        ("translate", "smoothing", "muon", "se"),
        ("trivial", "muon", "se"),
        ("translate", "cutout", "muon", "se"),
        ("translate", "cutmix", "muon", "se"),
        ("translate", "smoothing", "muon-fast", "se"),
        ("translate", "smoothing", "muon", "se", "silu"),
        ("translate", "smoothing", "muon", "se", "plain-gamma"),
        ("smoothing", "muon-fast", "se"),
    )


@dataclass(frozen=True)
class Arm:
    """What it changes of the baseline's recipe."""

    family: str
    what: str
    changes: dict[str, Any]


_MUON = {"name": "muon", "lr": 0.06, "momentum": 0.6}
_REST = {"name": "lamb", "lr": 0.012, "weight_decay": 0.02, "betas": [0.8, 0.95]}
_FAST = {**_MUON, "lr": 0.15, "rest": {**_REST, "lr": 0.03}}
_JITTER = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3}
# In the order in which a combination puts them together; by it, too, they are run.
ARMS = {
    "translate": Arm("geometry", "shifts to 1/8", {"augment": {"affine": {"translate": 0.125}}}),
    "cutout": Arm(
        "filling in", "cutout, 8 pixels", {"augment": {"ops": [{"name": "cutout", "size": 8}]}}
    ),
    "trivial": Arm("policy", "TrivialAugment", {"augment": {"ops": ["trivialaugment"]}}),
    "smoothing": Arm("loss", "label smoothing 0.1", {"loss": {"label_smoothing": 0.1}}),
    "muon": Arm("optimizer", "Muon and LAMB", {"optimizer": {**_MUON, "rest": _REST}}),
    "se": Arm(
        "attention",
        "SE in all stages",
        {"model": {"attention": {"name": "se", "stages": [1, 2, 3, 4]}}},
    ),
    "cutmix": Arm("mixing", "CutMix 1.0", {"augment": {"cutmix": 1.0}}),
    "jitter": Arm("colour", "jitter 0.3", {"augment": {"jitter": _JITTER}}),
    "group": Arm(
        "normalisation",
        "GroupNorm of 8, standardised weights",
        {"model": {"norm": {"name": "group", "groups": 8}, "weight_standardization": True}},
    ),
    "bce": Arm("loss", "binary cross-entropy", {"loss": {"name": "bce"}}),
    "orthogonal": Arm(
        "initialisation", "orthogonal", {"model": {"init": {"weights": {"name": "orthogonal"}}}}
    ),
    "drop-path": Arm(
        "regularisation", "stochastic depth 0.1", {"model": {"options": {"drop_path_rate": 0.1}}}
    ),
    "sam": Arm(
        "regularisation",
        "SAM, rho 0.05: twice the passes",
        {"regularise": {"sharpness": {"name": "sam"}}},
    ),
    "muon-fast": Arm("optimizer", "Muon and LAMB, 2.5 times as fast", {"optimizer": _FAST}),
    "silu": Arm("activation", "SiLU", {"model": {"activation": "SiLU"}}),
    "ghost": Arm(
        "normalisation",
        "ghost BatchNorm of 32",
        {"model": {"norm": {"name": "ghost_batch", "samples": 32}}},
    ),
    "plain-gamma": Arm(
        "initialisation",
        "without the zero gamma that timm gives",
        {"model": {"options": {"zero_init_last": False}}},
    ),
    "poly1": Arm("loss", "poly-1", {"loss": {"name": "poly1"}}),
    "mixup": Arm("mixing", "mixup 0.2", {"augment": {"mixup": 0.2}}),
    "randaugment": Arm("policy", "RandAugment 2 x 9", {"augment": {"ops": ["randaugment"]}}),
    "erasing": Arm(
        "filling in", "erasing 0.5", {"augment": {"ops": [{"name": "erasing", "p": 0.5}]}}
    ),
    "affine": Arm(
        "geometry",
        "shifts to 1/8, turns to 10 degrees, zoom to 10 %",
        {"augment": {"affine": {"translate": 0.125, "degrees": 10, "scale": 0.1}}},
    ),
    "crop": Arm(
        "geometry", "random resized crop from 0.5", {"augment": {"crop": {"scale": [0.5, 1]}}}
    ),
    "decay": Arm("optimizer", "weight decay 2e-3", {"optimizer": {"weight_decay": 2.0e-3}}),
    "dropout": Arm("regularisation", "dropout 0.2", {"model": {"options": {"drop_rate": 0.2}}}),
}  # fmt: skip


QUICK = ("translate", "smoothing", "se")
ERASERS = ("cutout", "erasing")


@dataclass(frozen=True)
class Trial:
    """One run: of the baseline, without arms, of an arm, or of several together."""

    arms: tuple[str, ...]
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{'.'.join(self.arms) or 'baseline'}-lr{self.lr:g}-seed{self.seed}"

    @property
    def has_more_scores(self) -> bool:
        """Whether averaged weights and mirrored looks are evaluated, too.

        They are of the baseline and of combinations, but not where the rate is tuned.
        """
        return len(self.arms) != 1 and self.seed > 0


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tree with the changes; lists of operations are joined, those that fill in last."""
    merged = dict(tree)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, list) and isinstance(old, list) and key == "ops":
            merged[key] = sorted(
                [*old, *value], key=lambda op: isinstance(op, dict) and op["name"] in ERASERS
            )
        elif isinstance(value, dict) and isinstance(old, dict):
            is_another = "name" in value and value["name"] != old.get("name")
            merged[key] = value if is_another else merge(old, value)
        else:
            merged[key] = value
    return merged


def recipe_tree(plan: Plan, trial: Trial, shards: Path) -> dict[str, Any]:
    """The recipe of a trial, as YAML would give it."""
    whole = f"{plan.epochs} epochs"
    tree: dict[str, Any] = {
        "name": trial.name,
        "seed": trial.seed,
        "duration": whole,
        "global_batch": plan.batch,
        "micro_batch": plan.batch,
        "data": {"path": str(shards), "image_size": plan.image_size, "workers": 0, "threads": 1},
        "model": LARGE_BATCH["cpu"].model,
        "optimizer": {
            "name": "sgd", "lr": trial.lr, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
        },
        "schedule": {"name": "cosine", "warmup": "1 epochs", "warmup_start": 0.1},
        "augment": {"flip": 0.5, "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]},
        "evaluate": {"every": whole},
        "checkpoint": {"every": "5 epochs", "keep": 1},
        "log": {"wandb": "off", "every": 100},
    }  # fmt: skip
    if trial.has_more_scores:
        tree["average"] = {"name": "ema", "half_life": f"{plan.epochs / 20:g} epochs"}
    for name, arm in ARMS.items():
        if name in trial.arms:
            tree = merge(tree, arm.changes)
    return tree


def run_trial(plan: Plan, trial: Trial, folder: Path) -> dict[str, Any]:
    """Train, or go on training, in this process; accuracies are None where it diverged."""
    run, summary = train(trial.name, recipe_tree(plan, trial, folder / "shards"), folder)
    result: dict[str, Any] = {**asdict(trial), "val": None, "test": None}
    if summary is None:
        return result
    for role in ("val", "test"):
        result[role] = summary[role]["members"][-1]["accuracy"]
        if trial.has_more_scores:
            result[f"{role}_ema"] = summary[role]["ema"]["accuracy"]
            result[f"{role}_flip"] = mirrored(run, folder / "shards" / role)
    return result | {"seconds": summary["seconds"], "steps": summary["steps"]}


def mirrored(run: Any, source: Path) -> float:
    """Accuracy of a run's last weights, each image's probabilities averaged with its mirror's.

    It is what `bigbatch evaluate --tta flip` starts, in this process.
    """
    from bigbatch.trainers.evaluation.record import EVALUATION
    from bigbatch.trainers.inference import __main__ as inference

    out = run.evaluations / f"{source.name}-mirrored"
    options = ["--members", "cycle-01", "--source", str(source), "--out", str(out)]
    if inference.main(["evaluate", str(run.path), "--tta", "flip", *options]):
        raise RuntimeError(f"{run.name} could not be evaluated; see log.txt")
    found: float = json.loads((out / EVALUATION).read_text())["accuracy"]
    return found


def trials_done(folder: Path) -> dict[Trial, dict[str, Any]]:
    """The results in trials.jsonl."""
    return {Trial(tuple(r["arms"]), r["lr"], r["seed"]): r for r in noted(folder)}


def write_part(source: Path, plan: Plan, file: Path) -> None:
    """The images of the plan, as many of each class, with a split column of train, val and test."""
    table = pq.read_table(source)
    splits, labels = table["split"].to_numpy().astype(str), table["label"].to_numpy()
    rows, names = [], []
    for label in np.unique(labels):
        train, test = (np.flatnonzero((splits == s) & (labels == label)) for s in ("train", "test"))
        parts = {
            "train": train[: plan.images],
            "val": train[plan.images : plan.images + plan.val],
            "test": test[: plan.test],
        }
        for split, part in parts.items():
            rows.append(part)
            names += [split] * len(part)
    part = table.take(pa.array(np.concatenate(rows))).drop(["split"])
    pq.write_table(part.append_column("split", pa.array(names)), file)


def main() -> None:
    parser = benchmark_parser(__doc__, quick="few images, two epochs, three arms, one seed")
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as Parquet")
    parser.add_argument("--report", action="store_true", help="run nothing; needs --folder")
    parser.add_argument("--folder", type=Path, help="keep shards and runs here, and go on there")
    parser.add_argument("--arms", help="some arms instead, such as muon,cutout")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at a time")
    options = parser.parse_args()
    if lacks_cifar10(parser, options.cifar10):
        return
    if options.report and not options.folder:
        parser.error("--report reads the trials noted in --folder; name it")
    plan = replace(Plan(), arms=tuple(ARMS))
    if options.quick:
        plan = Plan(100, 50, 100, 2, 50, 16, (0.1, 0.2), (1,), (2,), QUICK, 3, (QUICK[:2],))
    if options.arms:
        plan = replace(plan, arms=tuple(arm.strip() for arm in options.arms.split(",")))
        if unknown := set(plan.arms) - ARMS.keys():
            parser.error(f"--arms {', '.join(unknown)}: choose of {', '.join(ARMS)}")
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        if not (folder / "shards").exists():
            write_part(options.cifar10, plan, folder / "part.parquet")
            write_shards(folder / "part.parquet", folder, None)
        pool = None if options.report else open_pool(folder, options.jobs)
        with pool or nullcontext():
            work, done = partial(run_trial, plan, folder=folder), trials_done(folder)
            result = study(
                plan, lambda trials: run_all(pool, work, trials, done, folder), options.json
            )
    print(markdown(result))


def study(
    plan: Plan, run: Callable[[Sequence[Trial]], list[dict[str, Any]]], file: Path | None
) -> dict[str, Any]:
    """All stages, as far as `run` has their trials; written after each."""
    result: dict[str, Any] = {
        "machine": machine("bigbatch", "timm", "torch", "numpy"),
        "plan": asdict(plan),
        "arms": {name: asdict(ARMS[name]) for name in plan.arms},
        "recipes": {},
        "tuning": run([Trial((), lr, 0) for lr in plan.rates]),
        "trials": [],
        "combinations": [],
        "best": [],
        "rows": [],
    }
    tried = [r for r in result["tuning"] if r["val"] is not None]
    if len(result["tuning"]) < len(plan.rates) or not tried:
        return result
    lr = max(tried, key=lambda r: r["val"])["lr"]
    result["recipes"] = {"baseline": recipe_tree(plan, Trial((), lr, 1), Path("shards"))}
    first, *others = plan.seeds
    alone = [(name,) for name in plan.arms]

    def more(stage: str, arms: Sequence[tuple[str, ...]], seeds: Sequence[int]) -> None:
        result[stage] += run([Trial(each, lr, seed) for seed in seeds for each in arms])
        if any(not r["arms"] for r in result["trials"]):
            result["rows"] = rows_of(result)
            write_figures(file, **result)

    more("trials", [(), *alone[: plan.before]], [first])
    more("combinations", plan.combinations, [first])
    best = max(result["combinations"], key=lambda r: r["val"] or 0.0, default=None)
    together = [] if best is None else [tuple(best["arms"])]
    for arms in together:
        result["recipes"]["best"] = recipe_tree(plan, Trial(arms, lr, 1), Path("shards"))
    # Side by side.
    run(
        [Trial((), lr, seed) for seed in others]
        + [Trial(a, lr, s) for a in together for s in plan.fresh]
    )
    more("best", together, plan.fresh)
    more("trials", [()], others)
    more("trials", alone[plan.before :], [first])
    for seed in others:
        more("trials", alone, [seed])
    return result


if __name__ == "__main__":
    main()
