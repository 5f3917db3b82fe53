"""What keeping freed memory is worth to a step on a CPU: trainers/engine/host_memory.py.

    python benchmarks/host_memory.py [--quick] [--json FILE]

Forward and backward of one micro-batch, one thread, in processes that keep freed memory and in
plain ones by turns. Processor time of a step, how much of it is the kernel's, page faults, and the
most memory that the process had. Medians over the processes; ratios are medians of the rounds'.
"""

import json
import resource
import statistics
import subprocess
import sys
from typing import Any

import timm
import torch
from machine import benchmark_parser, machine, write_figures
from torch.nn.functional import cross_entropy

from bigbatch.trainers.engine.host_memory import keep_freed_memory

# Network, pixels, images of a micro-batch, steps
CASES = [("test_resnet", 32, 64, 60), ("test_resnet", 96, 64, 20), ("resnet18", 96, 32, 6)]
_BEFORE = 3  # steps that are not counted
_ONE = "--one"  # of a process that measures


def step_of(name: str, size: int, images: int, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model(name, num_classes=10)
    x, y = torch.randn(images, 3, size, size), torch.randint(10, (images,))

    def step() -> None:
        model.zero_grad()
        cross_entropy(model(x), y).backward()

    for _ in range(_BEFORE):
        step()
    first = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        step()
    last = resource.getrusage(resource.RUSAGE_SELF)
    user, kernel = last.ru_utime - first.ru_utime, last.ru_stime - first.ru_stime
    return {
        "cpu_ms": 1e3 * (user + kernel) / steps,
        "kernel_ms": 1e3 * kernel / steps,
        "faults": (last.ru_minflt - first.ru_minflt) / steps,
        "most_mib": last.ru_maxrss / 1024,
    }


def main() -> None:
    if sys.argv[1:2] == [_ONE]:
        kept, number = sys.argv[2] == "kept", int(sys.argv[3])
        if kept:
            keep_freed_memory()
        print(json.dumps(step_of(*CASES[number])))
        return
    parser = benchmark_parser(__doc__, quick="one round of the smallest case")
    options = parser.parse_args()
    rounds = 1 if options.quick else 7
    figures: dict[str, Any] = {}
    for number, (name, size, images, _) in enumerate(CASES[:1] if options.quick else CASES):
        found: dict[str, list[dict[str, float]]] = {"plain": [], "kept": []}
        for turn in range(rounds):
            for which in sorted(found, reverse=turn % 2 == 0):
                command = [sys.executable, __file__, _ONE, which, str(number)]
                found[which].append(json.loads(subprocess.check_output(command)))
        middle = {
            which: {key: round(statistics.median(f[key] for f in those), 2) for key in those[0]}
            for which, those in found.items()
        }
        pairs = zip(found["kept"], found["plain"], strict=True)
        ratio = statistics.median(k["cpu_ms"] / p["cpu_ms"] for k, p in pairs)
        case = f"{name}, {size} pixels, {images} images"
        figures[case] = {**middle, "ratio": round(ratio, 3)}
        print(case, json.dumps(figures[case]), flush=True)
    write_figures(options.json, machine=machine("bigbatch", "timm", "torch"), figures=figures)


if __name__ == "__main__":
    main()
