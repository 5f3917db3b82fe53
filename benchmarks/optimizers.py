"""Milliseconds and memory of an optimizer step: LARS, LAMB and Muon beside torch's and timm's.

    python benchmarks/optimizers.py [--quick] [--json FILE] [--threads N]

The parameters of ResNet-50 in float32 with random values and gradients. All optimizers take
turns, one step each, so that every step starts with cold caches, as after a backward pass,
and noise of the machine meets all alike. Each ratio is the median of the ratios within a
round. Memory is what the first three steps add to the process (to the GPU where there is
one), in parameter sizes, each optimizer in a process of its own: state plus the largest
temporary. On a GPU the steps captured in a CUDA graph are measured as well.

Muon's steps take a hundred times as long, so they have rounds of their own, a tenth as many.
torch's takes no convolutions: beside it the same weights are matrices, and nothing else is
trained. torch's and timm's compute in bfloat16, which CPUs with AMX have units for; ours does
with ns_precision bf16.
"""

import argparse
import ctypes
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
from machine import benchmark_parser, machine, write_figures
from torch import Tensor, nn

from bigbatch.configs import optimizers as c
from bigbatch.trainers.optim import build_optimizer
from bigbatch.trainers.optim.groups import hidden_matrices, parameter_groups
from bigbatch.trainers.optim.muon import Muon

DECAY = 1e-4
# Each beside the optimizer that its ratio is taken to.
CASES = {
    "sgd, torch fused": "sgd, torch fused",
    "lars": "sgd, torch fused",
    "lars, nesterov": "sgd, torch fused",
    "lars, timm": "sgd, torch fused",
    "adamw, torch fused": "adamw, torch fused",
    "lamb": "adamw, torch fused",
    "lamb, timm": "adamw, torch fused",
}
MUON_CASES = {
    "muon, torch, matrices": "muon, torch, matrices",
    "muon, bf16, matrices": "muon, torch, matrices",
    "muon, matrices": "muon, torch, matrices",
    "muon, timm": "muon, timm",
    "muon, bf16": "muon, timm",
    "muon": "muon, timm",
}
REFERENCES = CASES | MUON_CASES


def make_model(device: str) -> nn.Module:
    """ResNet-50 with random weights of the usual size, and a gradient for each."""
    generator = torch.Generator(device).manual_seed(0)
    model = timm.create_model("resnet50").to(device)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, device=device, generator=generator) * 1e-3
    return model


def make_optimizer(case: str, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model, DECAY)
    precision: Any = "bf16" if "bf16" in case else "fp32"
    if case.endswith("matrices"):
        matrices = [as_matrix(p) for p in hidden_matrices(model)]
        if "torch" in case:
            return torch.optim.Muon(matrices, lr=1e-3, weight_decay=DECAY)
        return Muon(matrices, lr=1e-3, weight_decay=DECAY, ns_precision=precision)
    match case:
        case "sgd, torch fused":
            return torch.optim.SGD(groups, lr=1e-4, momentum=0.9, fused=True)
        case "adamw, torch fused":
            return torch.optim.AdamW(groups, lr=1e-6, fused=True, capturable=True)
        case "lars":
            return build_optimizer(model, c.LARS(name="lars", lr=0.1, weight_decay=DECAY))
        case "lars, nesterov":
            config = c.LARS(name="lars", lr=0.1, weight_decay=DECAY, nesterov=True)
            return build_optimizer(model, config)
        case "lamb":
            return build_optimizer(model, c.LAMB(name="lamb", lr=1e-6, weight_decay=DECAY))
        case "lars, timm":
            return timm.optim.Lars(groups, lr=0.1, momentum=0.9)
        case "lamb, timm":
            return timm.optim.Lamb(groups, lr=1e-6)
        case "muon, timm":
            return timm.optim.Muon(model.parameters(), lr=1e-3, weight_decay=DECAY, nesterov=True)
        case "muon" | "muon, bf16":
            config = c.Muon(name="muon", lr=1e-3, weight_decay=DECAY, ns_precision=precision)
            return build_optimizer(model, config)
    raise ValueError(case)


def as_matrix(p: Tensor) -> nn.Parameter:
    """The same weight as [out, in x kh x kw], with its gradient."""
    assert p.grad is not None
    matrix = nn.Parameter(p.detach().flatten(1))
    matrix.grad = p.grad.flatten(1)
    return matrix


def measure_time(
    cases: list[str], repeats: int, device: str, captured: bool
) -> dict[str, list[float]]:
    """Milliseconds of each step, `repeats` for each case, taken in turn."""
    steps: dict[str, Callable[[], object]] = {}
    for case in cases:
        optimizer = make_optimizer(case, make_model(device))
        steps[case] = capture(optimizer) if captured else optimizer.step
    times: dict[str, list[float]] = {case: [] for case in cases}
    for round in range(-2, repeats):
        for case, step in steps.items():
            elapsed = milliseconds(step, device)
            if round >= 0:
                times[case].append(elapsed)
    return times


def milliseconds(step: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e3


def capture(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """The optimizer's step as a CUDA graph; fails where it reads anything back."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def measure_memory(case: str, device: str) -> float:
    """Bytes that three steps add at their peak, per byte of parameters, in this process."""
    model = make_model(device)
    optimizer = make_optimizer(case, model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what is free inside the process would hide growth
        Path("/proc/self/clear_refs").write_text("5")  # peak := current
        before = resident("VmRSS")
    for _ in range(3):
        optimizer.step()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return (after - before) / size


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def in_own_process(case: str) -> float:
    command = [sys.executable, __file__, "--memory-of", case]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def table(times: dict[str, list[float]], memory: dict[str, float]) -> dict[str, dict[str, float]]:
    figures = {}
    print(f"{'':24}{'median ms':>10}{'lowest':>8}{'ratio':>7}{'memory':>8}  reference")
    for case, found in times.items():
        reference = REFERENCES[case]
        pairs = zip(found, times[reference], strict=True)
        row = {
            "median_ms": round(statistics.median(found), 3),
            "lowest_ms": round(min(found), 3),
            "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        }
        if case in memory:
            row["memory"] = round(memory[case], 2)
        figures[case] = row
        print(
            f"{case:24}{row['median_ms']:10.2f}{row['lowest_ms']:8.2f}{row['ratio']:7.2f}"
            f"{row.get('memory', float('nan')):8.2f}  {reference}"
        )
    return figures


def main() -> None:
    parser = benchmark_parser(__doc__, quick="10 rounds instead of 100")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(measure_memory(options.memory_of, device))
        return
    repeats = 10 if options.quick else 100
    memory = {case: in_own_process(case) for case in REFERENCES}
    figures = {"step": table(measure_time(list(CASES), repeats, device, False), memory)}
    rounds = max(3, repeats // 10)
    times = measure_time(list(MUON_CASES), rounds, device, False)
    figures["step"] |= table(times, memory)
    if device == "cuda":
        print("captured in a CUDA graph")
        # timm's Lars reads its rate on the host, which a graph would freeze: it has no part here.
        cases = [case for case in CASES if not case.endswith("timm")]
        figures["captured step"] = table(measure_time(cases, repeats, device, True), {})
    where = machine("bigbatch", "timm", "torch", rounds=repeats, muon_rounds=rounds)
    write_figures(options.json, machine=where, figures=figures)


if __name__ == "__main__":
    main()
