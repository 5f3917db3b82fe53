"""Ranks forked from one process that has imported torch, beside ranks started from nothing.

    python benchmarks/warm.py [--quick] [--ranks N] [--json FILE]

Runs of the digits in turns, A B A B: medians of the seconds from the agent's start to the first
finished step, of those from the SIGKILL of a rank to the next one, of the memory of all processes
after three steps (PSS: shared pages counted once), and of that which a rank has to itself. From
nothing is what the agent does where OMP_NUM_THREADS is not set: it then chooses a core for each
rank itself, too late for what it has loaded.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from machine import benchmark_parser, machine, write_figures

from bigbatch.configs.files import read_jsonl
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.writing.shard import shard
from bigbatch.launcher.child import kill_tree
from bigbatch.launcher.start import agent_command

WORKER = "bigbatch.trainers.worker"
CHANGES = [
    *("global_batch=1024", "micro_batch=32", "duration=400 steps", "schedule={name: constant}"),
    *("data.workers=0", "log.wandb=off", "checkpoint.every=1 steps"),
]


def steps(run: RunDir) -> int:
    return sum(r["kind"] == "train" for r in read_jsonl(run.metrics))


def starts(run: RunDir) -> int:
    return sum(e["kind"] == "start" for e in read_jsonl(run.events))


def wait(ready: Any, process: subprocess.Popen[bytes]) -> float:
    """Seconds until `ready()` is true."""
    started = time.monotonic()
    while not ready():
        assert process.poll() is None, "the run has ended"
        time.sleep(0.01)
    return time.monotonic() - started


def family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def memory(process: psutil.Process, *fields: str) -> int:
    """Kilobytes of a process, of these fields of its smaps_rollup."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return sum(sizes[field] for field in fields)


def measure(run: RunDir, ranks: int, warm: bool) -> dict[str, float]:
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    if warm:
        env["OMP_NUM_THREADS"] = "1"
    with (run.path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            agent_command(run.path, ranks), env=env, stdout=output, stderr=output
        )
    try:
        first = wait(lambda: steps(run) >= 1, process)
        wait(lambda: steps(run) >= 3, process)
        members = family(process.pid)
        of_ranks = [p for p in psutil.Process(process.pid).children() if WORKER in p.cmdline()]
        assert len(of_ranks) == ranks
        found = {
            "first_step_s": first,
            "pss_mb": sum(memory(p, "Pss") for p in members) / 1024,
            "private_mb_a_rank": statistics.median(
                memory(p, "Private_Clean", "Private_Dirty") / 1024 for p in of_ranks
            ),
        }
        of_ranks[-1].kill()
        started = time.monotonic()
        wait(lambda: starts(run) > 1, process)
        last = steps(run)
        wait(lambda: steps(run) != last, process)
        found["restart_s"] = time.monotonic() - started
        return found
    finally:
        kill_tree(process.pid)
        process.wait()
        cold = "from nothing" in (run.path / "output.txt").read_text()
        assert cold != warm, "not what was to be measured"


def main() -> None:
    parser = benchmark_parser(__doc__, quick="one round instead of five")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: options.ranks]
    os.sched_setaffinity(0, cores)  # one for each rank, or fewer: one thread a rank, both ways
    rounds = 1 if options.quick else 5
    found: dict[str, list[dict[str, float]]] = {"warm": [], "cold": []}
    with tempfile.TemporaryDirectory(prefix="bigbatch-warm-") as temporary:
        folder = Path(temporary)
        shard("digits", folder / "digits", progress=False)
        recipe = load_recipe("digits", [f"data.path={folder / 'digits'}", *CHANGES], say=None)
        for _ in range(rounds):
            for name, rows in found.items():
                run = create_run(folder / "run", recipe)
                rows.append(measure(run, options.ranks, name == "warm"))
                shutil.rmtree(run.path)
    print(f"{options.ranks} ranks, medians of {rounds}: {'warm':>10}{'cold':>10}{'ratio':>8}")
    figures = {}
    for key in found["warm"][0]:
        pairs = list(zip(*([row[key] for row in rows] for rows in found.values()), strict=True))
        warm, cold = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        figures[key] = {"warm": round(warm, 2), "cold": round(cold, 2), "ratio": round(ratio, 3)}
        print(f"{key:24}{warm:15.1f}{cold:10.1f}{ratio:8.2f}")
    where = machine("bigbatch", "torch", ranks=options.ranks, rounds=rounds)
    write_figures(options.json, machine=where, figures=figures)


if __name__ == "__main__":
    sys.exit(main())
