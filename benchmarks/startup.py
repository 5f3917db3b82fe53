"""What a start costs: seconds, modules and private memory, against an older commit.

    python benchmarks/startup.py [--against REV] [--case NAME ...] [--rounds N]
                                 [--quick] [--json FILE]

imports: each entry in a fresh interpreter, beside bare `import torch`. commands: short ones, whole.
train: `bigbatch train digits --nproc 2`, to the first finished step, to the table of results, to
the end, and the memory of its ranks at the first step. restart: from SIGKILL of a rank to the next
finished step. 2-ranks, 16-ranks: to the start event, a step, memory after three of them. tune,
tune-2 (two trials at a time), find-lr, prove: whole commands. suite, which runs only where it is
named: the default tests, those of one name that both trees have.

REV is checked out into a second folder, and both run in this environment. They take turns, each
first in turn; figures are medians, ratios medians of the rounds'. Exit status 1 where an entry has
imported what tests/helpers/imports.py denies it. --quick measures the imports alone, once.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from against import checkout
from machine import benchmark_parser, machine, write_figures
from startup_runs import CASES, environment, write_shards
from startup_suite import suite

sys.path.append(str(Path(__file__).parents[1]))  # for the tests' deny-lists
from tests.helpers.imports import DENIED

ROOT = Path(__file__).parents[1]
BEFORE = "32e6f1a"  # before any of this was looked at
# Modules by what they are measured as.
ENTRIES = {
    "torch": ("torch",),
    "command line": ("bigbatch.launcher.cli.main",),
    "agent": ("bigbatch.trainers.agent",),
    "worker": ("bigbatch.trainers.worker",),
    "rank, whole": ("bigbatch.trainers.worker", "bigbatch.trainers.run"),
}
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "bigbatch --help": ("-m", "bigbatch.launcher.cli", "--help"),
    "bigbatch recipes": ("-m", "bigbatch.launcher.cli", "recipes"),
    "a worker that is refused": ("-m", "bigbatch.trainers.worker", "no-such-run"),
}
ALL = ("imports", "commands", *CASES)
_MEASURE = """
import importlib, json, sys, time
names, denied = json.loads(sys.argv[1])
wall, cpu = time.perf_counter(), time.process_time()
for name in names:
    importlib.import_module(name)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
memory = {}
for line in open("/proc/self/smaps_rollup").readlines()[1:]:
    key, value, _ = line.split()
    memory[key.rstrip(":")] = int(value) / 1024
print(json.dumps({
    "seconds": wall, "cpu_s": cpu, "modules": len(sys.modules), "pss_mib": memory["Pss"],
    "private_mib": memory["Private_Clean"] + memory["Private_Dirty"],
    "denied": [name for name in denied if name in sys.modules],
}))
"""

Figures = dict[str, float]
Runs = dict[str, list[Figures]]  # of the tree "old", and of "new"


def nearest(tree: Path, module: str) -> str:
    """A module, or what holds it where `tree` has no such one: an installed one would answer."""
    while module.startswith("bigbatch."):
        path = tree.joinpath(*module.split(".")[1:])
        if path.is_dir() or path.with_suffix(".py").exists():
            break
        module = module.rpartition(".")[0]
    return module


def imported(tree: Path, modules: tuple[str, ...]) -> dict[str, Any]:
    """What importing modules costs in a fresh interpreter, and what is denied and came along."""
    denied = sorted(DENIED.get(modules[-1], ()))
    names = [nearest(tree, module) for module in modules]
    command = [sys.executable, "-P", "-c", _MEASURE, json.dumps([names, denied])]
    done = subprocess.run(
        command, env=environment(tree), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(modules)} of {tree}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def whole(tree: Path, arguments: tuple[str, ...]) -> Figures:
    """Seconds of a process from its start to its end, whatever its status."""
    started = time.perf_counter()
    command = [sys.executable, "-P", *arguments]
    subprocess.run(command, env=environment(tree), capture_output=True, check=False)
    return {"seconds": time.perf_counter() - started}


def turns(trees: dict[str, Path], rounds: int) -> Iterator[tuple[str, Path, str]]:
    """Which tree comes, where it lies, and a name for what it does: each goes first in turn."""
    for number in range(rounds):
        for which in sorted(trees, reverse=number % 2 == 0):
            yield which, trees[which], f"{which}-{number}"


def summary(runs: Runs) -> dict[str, Any]:
    """Medians of both trees, and the medians of the rounds' ratios, new over old."""
    keys = runs["new"][0].keys() & runs["old"][0].keys()
    middle = {
        which: {k: round(statistics.median(run[k] for run in those), 3) for k in those[0]}
        for which, those in runs.items()
    }
    pairs = list(zip(runs["new"], runs["old"], strict=True))
    ratios = {
        key: round(statistics.median(new[key] / old[key] for new, old in pairs), 3)
        for key in sorted(keys)
        if all(old[key] for _, old in pairs)
    }
    return {**middle, "ratio": ratios}


def said(name: str, figures: dict[str, Any]) -> None:
    cells = [
        f"{key} {figures['old'][key]:,.2f} -> {figures['new'][key]:,.2f} ({ratio:.2f})"
        for key, ratio in figures["ratio"].items()
    ]
    print(f"{name:26} {'  '.join(cells)}", flush=True)


def imports(trees: dict[str, Path], rounds: int) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Figures of each entry, and what is denied to one and came with it here."""
    runs: dict[str, Runs] = {name: {"old": [], "new": []} for name in ENTRIES}
    back: dict[str, list[str]] = {}
    for tree in trees.values():  # into the page cache, and compiled
        imported(tree, ENTRIES["rank, whole"])
    for which, tree, _ in turns(trees, rounds):
        for name, modules in ENTRIES.items():
            found = imported(tree, modules)
            again = found.pop("denied")
            if again and which == "new":
                back[name] = again
            base = runs["torch"][which][-1] if name != "torch" else found
            found["times_torch_cpu"] = found["cpu_s"] / base["cpu_s"]
            runs[name][which].append(found)
    return {name: summary(each) for name, each in runs.items()}, back


def commands(trees: dict[str, Path], rounds: int) -> dict[str, Any]:
    runs: dict[str, Runs] = {name: {"old": [], "new": []} for name in COMMANDS}
    for which, tree, _ in turns(trees, rounds):
        for name, arguments in COMMANDS.items():
            runs[name][which].append(whole(tree, arguments))
    return {name: summary(each) for name, each in runs.items()}


def main() -> int:
    parser = benchmark_parser(__doc__, quick="the imports alone, once")
    parser.add_argument("--against", default=BEFORE, metavar="REV", help="commit to compare with")
    parser.add_argument(
        "--case", action="append", choices=(*ALL, "suite"), help="default: all but suite"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    cases = ["imports"] if options.quick else options.case or ALL
    figures: dict[str, Any] = {}
    back: dict[str, list[str]] = {}
    where = machine(
        "bigbatch", "torch", "timm", "accelerate", against=options.against, rounds=rounds
    )
    with checkout(options.against) as old, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trees = {"old": old, "new": ROOT}
        for case in cases:
            if case == "imports":
                found, back = imports(trees, rounds)
                figures |= found
            elif case == "commands":
                figures |= commands(trees, rounds)
            else:
                write_shards(ROOT, folder)
                measure = suite(trees) if case == "suite" else CASES[case]
                runs: Runs = {"old": [], "new": []}
                for which, tree, name in turns(trees, rounds):
                    runs[which].append(measure(tree, folder, f"{case}-{name}"))
                figures[case] = summary(runs)
            # What is measured stands in the file, also where a later case fails.
            write_figures(options.json, machine=where, figures=figures)
    for name, each in figures.items():
        said(name, each)
    for entry, names in back.items():
        for name in names:
            print(f"{entry} imports {name}: {DENIED[ENTRIES[entry][-1]][name]}", file=sys.stderr)
    return 1 if back else 0


if __name__ == "__main__":
    sys.exit(main())
