"""What grows with the number of ranks: the start, a step, memory and the end, on one machine.

    python benchmarks/many_ranks.py [--ranks 1,2,4,8,16,24] [--reduction R ...] [--batch N]
                                    [--rounds N] [--quick] [--json FILE]

A run of the digits of 12 steps, at a global batch of 1,024 in 32 micro-batches, one thread a rank,
by the agent as `bigbatch train --nproc` starts it; with a small --batch little is left but what is
not computing. Of each number of ranks, medians of the rounds: seconds from the agent's start to the
start event and to the first finished step, of a step (the median of those after the second), and
from the last step to the end of all processes; CPU seconds of all; memory of all processes after
three steps (PSS: shared pages counted once), what a rank has to itself, and the megabytes and files
of the run directory. And without any ranks, for up to 10,000: the bytes that a recorded step's
timings add to its all-reduce, and the milliseconds that each rank takes to make and to read them.
Where ranks share cores, a step of more ranks computes the same and only
exchanges more: its growth is the exchange's and the waiting's.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from machine import benchmark_parser, machine, write_figures
from warm import WORKER, family, memory, starts, steps

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.writing.shard import shard
from bigbatch.launcher.child import kill_tree
from bigbatch.launcher.start import agent_command
from bigbatch.trainers.engine import read_back
from bigbatch.trainers.monitoring.phases import PHASES, Clock, Timings

STEPS, MICRO_BATCHES = 12, 32
CHANGES = [
    *("duration=400 steps", "schedule={name: constant}"),
    *("data.workers=0", "log.wandb=off", "evaluate.every=400 steps"),
]


def measure(run: RunDir, ranks: int) -> dict[str, float]:
    began = time.monotonic()
    with (run.path / "output.txt").open("w") as output:
        command = agent_command(run.path, ranks, stop_at=STEPS)
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:

        def wait(ready: Callable[[], bool]) -> float:
            while not ready():
                said = (run.path / "output.txt").read_text()
                assert process.poll() is None, f"{ranks} ranks have ended: {said}"
                time.sleep(0.01)
            return time.monotonic() - began

        found = {
            "start_s": wait(lambda: starts(run) > 0),
            "first_step_s": wait(lambda: steps(run) > 0),
        }
        wait(lambda: steps(run) >= 3)
        children = psutil.Process(process.pid).children()
        of_ranks = [p for p in children if WORKER in p.cmdline()]
        assert len(of_ranks) == ranks
        found["pss_mb"] = sum(memory(p, "Pss") for p in family(process.pid)) / 1024
        found["private_mb_a_rank"] = statistics.median(
            memory(p, "Private_Clean", "Private_Dirty") / 1024 for p in of_ranks
        )
        found["threads_a_rank"] = statistics.median(p.num_threads() for p in of_ranks)
        found["files_open_a_rank"] = statistics.median(p.num_fds() for p in of_ranks)
        last = wait(lambda: steps(run) == STEPS)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, (run.path / "output.txt").read_text()
        found["end_s"] = time.monotonic() - began - last
        found["cpu_s"] = usage.ru_utime + usage.ru_stime
    finally:
        if process.returncode is None:
            kill_tree(process.pid)
            process.wait()
    taken = [float(r["step_s"]) for r in read_jsonl(run.metrics) if r["kind"] == "train"]
    files = [path for path in run.path.rglob("*") if path.is_file()]
    return found | {
        "step_s": statistics.median(taken[2:]),
        "files": len(files),
        "megabytes": sum(path.stat().st_size for path in files) / 1e6,
    }


def record_costs(ranks: int, steps: int = 20) -> dict[str, float]:
    """Of the timings of a step, which say what each rank took for each phase."""
    clock, timings = Clock(torch.device("cpu"), ranks - 1, ranks), Timings(ranks)
    tables, taken = [], []
    for _ in range(steps):
        clock.begin_step()
        for phase in PHASES:
            with clock(phase):
                pass
        began = time.process_time()
        tables.append(clock.table())
        taken.append(time.process_time() - began)
    for number, table in enumerate(tables):
        every = table.view(ranks, -1)[-1].expand(ranks, -1).reshape(-1)  # as if all had sent theirs
        began = time.process_time()
        timings.add(read_back({"timings": every})["timings"])
        timings.mean(), timings.slowest()
        taken[number] += time.process_time() - began
    return {"bytes": tables[0].numel() * 8, "ms": 1000 * statistics.median(taken)}


def main() -> None:
    parser = benchmark_parser(__doc__, quick="one round of 1 and 3 ranks, a batch of 64")
    parser.add_argument("--ranks", default="1,2,4,8,16,24", help="numbers of ranks")
    parser.add_argument("--reduction", nargs="+", default=["exact", "overlapped"])
    parser.add_argument("--batch", type=int, default=1024, help="global, a multiple of 32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    batch = 64 if options.quick else options.batch
    os.environ["OMP_NUM_THREADS"] = "1"
    counts = [1, 3] if options.quick else [int(n) for n in options.ranks.split(",")]
    rounds = 1 if options.quick else options.rounds
    rows: dict[str, dict[int, list[dict[str, float]]]] = {
        reduction: {ranks: [] for ranks in counts} for reduction in options.reduction
    }
    with tempfile.TemporaryDirectory(prefix="bigbatch-ranks-") as temporary:
        folder = Path(temporary)
        shard("digits", folder / "digits", progress=False)
        for _ in range(rounds):
            for reduction, by_count in rows.items():
                changes = [f"data.path={folder / 'digits'}", *CHANGES, f"reduction={reduction}"]
                changes += [f"global_batch={batch}", f"micro_batch={batch // MICRO_BATCHES}"]
                recipe = load_recipe("digits", changes, say=None)
                for ranks, found in by_count.items():
                    run = create_run(folder / "run", recipe)
                    found.append(measure(run, ranks))
                    shutil.rmtree(run.path)
    figures = {
        reduction: {
            str(ranks): {
                key: round(statistics.median(row[key] for row in found), 3) for key in found[0]
            }
            for ranks, found in by_count.items()
        }
        for reduction, by_count in rows.items()
    }
    records = {str(ranks): record_costs(ranks) for ranks in (8, 100, 1000, 10_000)}
    for ranks, cost in records.items():
        print(
            f"timings of {ranks:>6} ranks: {cost['bytes']:>8} bytes, {cost['ms']:.2f} ms a record"
        )
    for reduction, table in figures.items():
        print(f"reduction {reduction}, medians of {rounds}; ranks: {'':>12}", end="")
        print("".join(f"{ranks:>10}" for ranks in table))
        for key in next(iter(table.values())):
            print(f"{key:52}", "".join(f"{row[key]:10.2f}" for row in table.values()))
    write_figures(
        options.json,
        machine=machine("bigbatch", "torch", rounds=rounds, steps=STEPS, batch=batch),
        records=records,
        **figures,
    )


if __name__ == "__main__":
    sys.exit(main())
