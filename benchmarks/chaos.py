"""Random faults while the digits recipe trains on two ranks; what was lost, and for how long.

    python benchmarks/chaos.py [--slurm] [--quick] [--faults 200] [--only FAULT,...]
        [--seed 0] [--json FILE]

Each run trains 60 short steps to its end, ensemble and report, on images of which some cannot be
read, with a checkpoint every 4, and meets five faults at random steps (--seed): those of
benchmarks/chaos_faults.py and chaos_edges.py. Whatever ends is started again with the same command,
`bigbatch resume`, as a queue would. Each fault has its own expectation, such as that a signal ends
with status 75 and a message, or that `bigbatch rm` is refused. A run passes if it ends with the
weights, the optimizer state and the records of a run that met no fault, bit for bit, with each step
once, if no restart began before the newest checkpoint that was whole at the fault, and if nothing
of it ended with a traceback or without a word. A run that makes no step for ten minutes counts as
hung.

With --slurm, on a SLURM of four nodes that it starts on this machine (as root, after
tests/install_slurm.sh), the runs have two ranks on each of two nodes, and the faults are those
of benchmarks/chaos_slurm.py; what the queue does not requeue is resubmitted.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import chaos_edges
import chaos_faults
import chaos_slurm
from chaos_faults import RANKS, STEPS, NewRun, Run, Wrong, until
from machine import benchmark_parser, machine, write_figures
from rich.console import Console
from rich.table import Table

FAULTS_IN_A_RUN = 5
LOCAL = chaos_faults.FAULTS | chaos_edges.FAULTS
FAULTS = LOCAL | chaos_slurm.FAULTS
LOCAL_KINDS = [*chaos_faults.KINDS, *chaos_edges.KINDS]
QUICK = (
    *("kill rank 1", "kill in a checkpoint", "disk full, bad samples", "linked checkpoint", "rm"),
    *("signal at a start", "flipped bit", "closed terminal", "NaN in buffers", "cancel"),
    "flipped bit of a weight",
)


@dataclass
class Outcome:
    """What became of one fault."""

    fault: str
    detail: str
    run: int
    step: int
    recover_s: float | None  # until a step beyond the last one before the fault; None: hung
    lost_steps: int  # that a checkpoint held, whole, and that were computed again


Problem = dict[str, Any]  # kind (hang, silent, deleted, other), run, fault, text


def main() -> None:
    parser = benchmark_parser(
        __doc__,
        quick="ten faults, of ten kinds",
        json_help="add the figures to those in this file",
    )
    parser.add_argument("--slurm", action="store_true", help="faults of a real SLURM, four ranks")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--only", metavar="FAULT,...", help="these kinds of faults alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=600, help="no new fault after these")
    options = parser.parse_args()
    if options.slurm and (reason := chaos_slurm.missing()):
        print(f"skipped: SLURM {reason}")
        return
    # Under nohup it would be ignored, and by all that is started here, too.
    signal.signal(signal.SIGHUP, lambda *_: None)
    deadline = time.monotonic() + 60 * options.minutes
    kinds = chaos_slurm.KINDS if options.slurm else LOCAL_KINDS
    if options.only:
        kinds = options.only.split(",")
        if unknown := set(kinds) - set(FAULTS):
            sys.exit(f"no fault is called {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    names = plan(kinds, options.seed, options.faults)
    if options.quick:
        names = list(chaos_slurm.QUICK if options.slurm else QUICK)
    groups = [names[i : i + FAULTS_IN_A_RUN] for i in range(0, len(names), FAULTS_IN_A_RUN)]
    outcomes: list[Outcome] = []
    wrong: list[Problem] = []
    runs = chaos_slurm.slurm_runs if options.slurm else chaos_faults.local_runs
    with (
        tempfile.TemporaryDirectory(prefix="bigbatch-chaos-") as folder,
        runs(Path(folder)) as new_run,
        ThreadPoolExecutor(1 if options.slurm else options.jobs) as pool,
    ):
        reference = undisturbed(new_run)
        jobs = [
            pool.submit(disturbed, new_run, number, group, options.seed, reference, deadline)
            for number, group in enumerate(groups)
        ]
        for job in jobs:
            found, problems = job.result()
            outcomes += found
            wrong += problems
    report(outcomes, wrong)
    if options.json:
        add_part(options.json, part(outcomes, wrong, options))
    if wrong or any(o.recover_s is None or o.lost_steps for o in outcomes):
        sys.exit("the run did not come through")


def plan(kinds: Sequence[str], seed: int, count: int) -> list[str]:
    """The faults, in order: each kind as often as it stands in `kinds`."""
    names = [kinds[i % len(kinds)] for i in range(count)]
    random.Random(seed).shuffle(names)
    return names


def undisturbed(new_run: NewRun) -> dict[str, Any]:
    with new_run("undisturbed") as run:
        run.start()
        until(lambda: run.ended() is not None)
        if run.ended() != 0:
            sys.exit(run.output())
        return run.state()


def disturbed(
    new_run: NewRun,
    number: int,
    faults: list[str],
    seed: int,
    reference: dict[str, Any],
    deadline: float,
) -> tuple[list[Outcome], list[Problem]]:
    """One run with its faults; returns their outcomes, and what was wrong at the end."""
    rng = random.Random(f"{seed}-{number}")
    outcomes: list[Outcome] = []
    wrong: list[Problem] = []

    def problem(kind: str, fault: str, text: str) -> None:
        wrong.append({"kind": kind, "run": number, "fault": fault, "text": text})
        print(wrong[-1], flush=True)

    if time.monotonic() > deadline:
        return [], []
    share = STEPS // (len(faults) + 1)
    with new_run(f"run-{number:03d}") as run:
        run.start()
        for index, name in enumerate(faults):
            if time.monotonic() > deadline:
                break
            aim = 5 + index * share + rng.randrange(share)
            try:
                if not reach(run, aim):
                    problem("hang", f"before {name}", tail(run))
                    return outcomes, wrong
                if run.step() >= STEPS:
                    break  # a fault before let it come so far; there is nothing left to disturb
                outcomes.append(meet(run, name, rng, number))
                print(asdict(outcomes[-1]), flush=True)
            except Wrong as error:
                problem(error.kind, name, str(error))
                if not run.run.recipe_file.exists():
                    return outcomes, wrong
                continue
            if outcomes[-1].recover_s is None:
                problem("hang", name, tail(run))
                return outcomes, wrong
        try:
            if not reach(run, STEPS) or not until(lambda: ended_well(run)):
                problem("hang", "its end", tail(run))
                return outcomes, wrong
            for which in (run, *run.finished()):
                found = which.state()
                for key in found:
                    if found[key] != reference[key]:
                        problem("other", "its end", f"{key} of {which.run.path} differ")
        except Wrong as error:
            problem(error.kind, "its end", str(error))
    return outcomes, wrong


def meet(run: Run, name: str, rng: random.Random, number: int) -> Outcome:
    """Let a fault happen, and wait until the run is further than it was before."""
    before, starts, held = run.step(), len(run.starts()), run.durable()
    detail = FAULTS[name](run, rng)
    began = time.monotonic()
    durable, at_once = run.durable(), len(run.starts())
    recovered = reach(run, min(max(before, run.step()) + 1, STEPS))
    seconds = time.monotonic() - began if recovered else None
    # A fault may start the run again itself, which can be far by now.
    lost = [held - step for step in run.starts()[starts:at_once]]
    lost += [durable - step for step in run.starts()[at_once:]]
    return Outcome(name, detail, number, before, seconds and round(seconds, 2), max([0, *lost]))


def reach(run: Run, step: int) -> bool:
    """Wait for a step, starting the run again whenever it ends before."""

    def there() -> bool:
        status = run.ended()
        if run.step() >= step and (status is None or status == 0):
            return True
        if status is not None:
            again(run)
        return False

    return until(there)


def ended_well(run: Run) -> bool:
    if run.ended() not in (None, 0):
        again(run)
    return run.ended() == 0


def again(run: Run) -> None:
    """Start a run that has ended once more, if it said why it ended."""
    found = run.unexplained()
    run.start()
    if found is not None:
        raise Wrong("silent", found)


def tail(run: Run) -> str:
    return "\n".join(run.output().splitlines()[-20:])


def report(outcomes: list[Outcome], wrong: list[Problem]) -> None:
    table = Table("fault", "times", "recovered", "lost steps", "median s", "slowest s")
    for row in rows(outcomes):
        table.add_row(*map(str, row.values()))
    console = Console(soft_wrap=True)
    console.print(table)
    for problem in wrong:
        console.print(problem, markup=False)
    console.print(", ".join(f"{count} {kind}" for kind, count in counts(wrong).items()))


def counts(wrong: list[Problem]) -> dict[str, int]:
    kinds = {"hangs": "hang", "silent": "silent", "deleted": "deleted", "wrong": "other"}
    return {name: sum(p["kind"] == kind for p in wrong) for name, kind in kinds.items()}


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


def part(
    outcomes: list[Outcome], wrong: list[Problem], options: argparse.Namespace
) -> dict[str, Any]:
    """One measurement: on what it was made, and what became of each fault."""
    recipe = ["digits", *chaos_faults.LOCAL_RECIPE]
    own = chaos_slurm.machine() if options.slurm else {"ranks": RANKS, "recipe": recipe}
    return {
        "machine": machine(
            "bigbatch", "torch", **own, steps=STEPS, seed=options.seed, runs_at_a_time=options.jobs
        ),
        "wrong": wrong,
        "faults": [asdict(o) for o in outcomes],
    }


def add_part(path: Path, new: dict[str, Any]) -> None:
    """The table of all measurements in the file and this one, and each of them."""
    parts = [*(json.loads(path.read_text())["parts"] if path.exists() else []), new]
    outcomes = [Outcome(**fault) for each in parts for fault in each["faults"]]
    wrong = [problem for each in parts for problem in each["wrong"]]
    write_figures(
        path,
        faults=len(outcomes),
        lost_steps=sum(o.lost_steps for o in outcomes),
        **counts(wrong),
        table=rows(outcomes),
        parts=parts,
    )


if __name__ == "__main__":
    main()
