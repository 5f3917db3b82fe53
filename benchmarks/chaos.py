"""Random faults while the digits recipe trains on two ranks; what was lost, and for how long.

    python benchmarks/chaos.py [--quick] [--faults 100] [--seed 0] [--jobs 1] [--json FILE]

Each run trains 60 short steps with a checkpoint every 4 and meets five faults at random steps
(--seed). Whatever ends is started again with the same command, as a queue would. A run passes
if it ends with the weights, the optimizer state and the records of a run that met no fault,
bit for bit, with each step once, and if no restart began before the newest checkpoint that was
whole at the fault. A run that makes no step for ten minutes counts as hung.

SIGKILL of slurmd is not among the faults: it needs a SLURM (tests/launcher/test_slurm_cluster.py).
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from chaos_faults import FAULTS, Run, small_disk, until
from rich.console import Console
from rich.table import Table

from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run, read_jsonl
from bigbatch.data.shard import shard

STEPS, FAULTS_IN_A_RUN = 60, 5
RECIPE = [
    "evaluate.every=20 steps",
    "checkpoint.every=4 steps",
    "recovery.stall_s=10",
    "log.wandb=off",
]
# The rest of a record are times, and averages over the steps since the last start.
RECORDED = ("kind", "step", "split", "epoch", "loss", "lr", "grad_norm", "accuracy", "nll", "ece")
QUICK = ("kill rank 1", "kill agent", "kill in a checkpoint", "disk full", "flipped bit", "double")


@dataclass
class Outcome:
    """What became of one fault."""

    fault: str
    detail: str
    run: int
    step: int
    recover_s: float | None  # until a step beyond the last one before the fault; None: hung
    lost_steps: int  # that a checkpoint held, whole, and that were computed again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="six faults of six kinds")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=600, help="no new fault after these")
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    names = plan(options.seed, 6 if options.quick else options.faults, options.quick)
    groups = [names[i : i + FAULTS_IN_A_RUN] for i in range(0, len(names), FAULTS_IN_A_RUN)]
    with tempfile.TemporaryDirectory(prefix="bigbatch-chaos-") as name:
        folder = Path(name)
        shard("digits", folder / "digits", progress=False)
        reference = undisturbed(folder)
        outcomes: list[Outcome] = []
        wrong: list[str] = []
        with ThreadPoolExecutor(options.jobs) as pool:
            jobs = [
                pool.submit(disturbed, folder, number, group, options.seed, reference, deadline)
                for number, group in enumerate(groups)
            ]
            for job in jobs:
                found, problems = job.result()
                outcomes += found
                wrong += problems
    report(outcomes, wrong)
    if options.json:
        options.json.write_text(json.dumps(figures(outcomes, wrong, options), indent=1) + "\n")
    if wrong or any(o.recover_s is None or o.lost_steps for o in outcomes):
        sys.exit("the run did not come through")


def plan(seed: int, count: int, quick: bool) -> list[str]:
    """The faults, in order: all kinds equally often, deaths in a checkpoint three times that."""
    if quick:
        return list(QUICK[:count])
    kinds = [*FAULTS, "kill in a checkpoint", "kill in a checkpoint"]
    names = [kinds[i % len(kinds)] for i in range(count)]
    random.Random(seed).shuffle(names)
    return names


def new_run(folder: Path, name: str) -> Run:
    changes = [f"data.path={folder.parent / 'digits'}", *RECIPE]
    return Run(create_run(folder / name, load_recipe("digits", changes)), STEPS)


def undisturbed(folder: Path) -> dict[str, Any]:
    (folder / "undisturbed").mkdir()
    run = new_run(folder / "undisturbed", "run")
    run.start()
    assert run.process is not None
    if run.process.wait(600) != 0:
        sys.exit((run.control / "output.txt").read_text())
    return state(run)


def state(run: Run) -> dict[str, Any]:
    """All that must not depend on faults: final files by hash, and what records say of them."""
    (newest,) = run.run.checkpoints.glob(f"step-{STEPS:08d}")
    manifest = json.loads((newest / "manifest.json").read_text())["files"]
    records = read_jsonl(run.run.metrics)
    return {
        "model": manifest["model.safetensors"]["sha256"],
        "optimizer": manifest["optimizer.safetensors"]["sha256"],
        "records": [{k: r.get(k) for k in RECORDED} for r in records],
    }


def disturbed(
    folder: Path,
    number: int,
    faults: list[str],
    seed: int,
    reference: dict[str, Any],
    deadline: float,
) -> tuple[list[Outcome], list[str]]:
    """One run with its faults; returns their outcomes, and what was wrong at the end."""
    rng = random.Random(f"{seed}-{number}")
    outcomes: list[Outcome] = []
    if time.monotonic() > deadline:
        return [], []
    place = folder / f"run-{number:03d}"
    share = STEPS // (len(faults) + 1)
    with small_disk(place):
        run = new_run(place, "run")
        try:
            run.start()
            for index, name in enumerate(faults):
                if time.monotonic() > deadline:
                    break
                aim = 5 + index * share + rng.randrange(share)
                if not reach(run, aim):
                    return outcomes, [f"run {number} hung before {name}: {tail(run)}"]
                outcomes.append(meet(run, name, rng, number))
                print(asdict(outcomes[-1]), flush=True)
                if outcomes[-1].recover_s is None:
                    return outcomes, [f"run {number} hung after {name}: {tail(run)}"]
            if not reach(run, STEPS) or not until(lambda: ended_well(run)):
                return outcomes, [f"run {number} hung at its end: {tail(run)}"]
            found = state(run)
            return outcomes, [
                f"run {number}: {k} differ" for k in found if found[k] != reference[k]
            ]
        finally:
            run.stop()


def meet(run: Run, name: str, rng: random.Random, number: int) -> Outcome:
    """Let a fault happen, and wait until the run is further than it was before."""
    before, starts = run.step(), len(run.starts())
    detail = FAULTS[name](run, rng)
    began = time.monotonic()
    durable = run.durable()
    recovered = reach(run, min(max(before, run.step()) + 1, STEPS))
    seconds = time.monotonic() - began if recovered else None
    later = run.starts()[starts:]
    lost = max([0, *(durable - step for step in later)])
    return Outcome(name, detail, number, before, seconds and round(seconds, 2), lost)


def reach(run: Run, step: int) -> bool:
    """Wait for a step, starting the run again whenever it ends before."""

    def there() -> bool:
        status = run.ended()
        if run.step() >= step and (status is None or status == 0):
            return True
        if status is not None:
            run.statuses.append(status)
            run.start()
        return False

    return until(there)


def ended_well(run: Run) -> bool:
    if run.ended() not in (None, 0):
        run.statuses.append(run.ended() or 0)
        run.start()
    return run.ended() == 0


def tail(run: Run) -> str:
    return "\n".join((run.control / "output.txt").read_text().splitlines()[-20:])


def report(outcomes: list[Outcome], wrong: list[str]) -> None:
    table = Table("fault", "times", "recovered", "lost steps", "median s", "slowest s")
    for row in rows(outcomes):
        table.add_row(*map(str, row.values()))
    console = Console(soft_wrap=True)
    console.print(table)
    for problem in wrong:
        console.print(problem, markup=False)
    console.print(f"{len(wrong)} runs wrong at the end")


def rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    found = []
    for name in [*FAULTS, "all"]:
        mine = [o for o in outcomes if name in (o.fault, "all")]
        times = [o.recover_s for o in mine if o.recover_s is not None]
        if mine:
            found.append(
                {
                    "fault": name,
                    "times": len(mine),
                    "recovered": len(times),
                    "lost_steps": sum(o.lost_steps for o in mine),
                    "median_s": round(statistics.median(times), 1) if times else None,
                    "slowest_s": max(times, default=None),
                }
            )
    return found


def figures(
    outcomes: list[Outcome], wrong: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "machine": {
            "date": time.strftime("%Y-%m-%d"),
            "device": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "recipe": ["digits", *RECIPE],
            "steps": STEPS,
            "ranks": 2,
            "seed": options.seed,
            "runs_at_a_time": options.jobs,
        },
        "hangs": sum(o.recover_s is None for o in outcomes),
        "lost_steps": sum(o.lost_steps for o in outcomes),
        "wrong": wrong,
        "table": rows(outcomes),
        "faults": [asdict(o) for o in outcomes],
    }


if __name__ == "__main__":
    main()
