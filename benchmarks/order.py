"""Positions per second and memory of the order of samples, at a thousand million samples.

    python benchmarks/order.py [--quick] [--json FILE]

Each policy in a process of its own, on one core. The index of the first table is virtual:
class c holds consecutive sample numbers, and no column is stored, so what is measured is the
order alone. The second table takes 1e8 samples with their columns in memory-mapped files,
and gives the time from opening those to the first micro-batch's byte ranges, at positions up
to the ten-thousandth epoch, without the imports. "lanes" is the order for network storage,
16 lanes that mix 4 shards of 10,000 samples each.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import benchmark_parser, machine, write_figures
from pydantic import TypeAdapter

from bigbatch.configs.sampling import Sampling
from bigbatch.data.index import Index, ShardFile
from bigbatch.data.index_files import map_column
from bigbatch.data.lanes import LaneOrder
from bigbatch.data.order import Order, build_order

SAMPLES = 10**9
CLASSES = 1000
ON_DISK = 10**8
BLOCK = 65_536
MICRO_BATCH = 256
POLICIES: dict[str, Any] = {
    "uniform": "uniform",
    "balanced": "balanced",
    "tempered": {"name": "tempered", "alpha": 0.5},
    "progressive, 90 epochs": {"name": "progressive", "epochs": 90},
    "label shuffling": "label_shuffling",
    "repeat factor": {"name": "repeat_factor", "threshold": 1e-3},
    "easy ensemble": {"name": "easy_ensemble", "member": 3},
}
LANES, WINDOW, SHARD = 16, 4, 10_000  # "lanes": that many, shards mixed, samples in a shard
NAMES = (*POLICIES, "lanes")


class VirtualMembers:
    """Class c's members are the sample numbers from its start on; none is stored."""

    def __getitem__(self, at: Any) -> Any:
        return at


def class_starts(samples: int) -> np.ndarray:
    """Long-tailed: the largest class has a hundred times the samples of the smallest."""
    share = 100 ** -np.linspace(0, 1, CLASSES)
    counts = np.maximum(1, (share / share.sum() * samples).astype(np.int64))
    counts[0] += samples - counts.sum()
    return np.concatenate([[0], np.cumsum(counts)])


def make_index(samples: int, columns: dict[str, Any]) -> Index:
    return Index(
        root=Path("virtual"),
        class_starts=class_starts(samples),
        classes=tuple(map(str, range(CLASSES))),
        shards=(ShardFile("000000.tar", 0, SHARD),) * (samples // SHARD),
        problems=(),
        hash="virtual",
        **columns,
    )


def virtual_index() -> Index:
    nothing = np.broadcast_to(np.uint32(0), SAMPLES)  # has a length, takes no memory
    names = ("shard", "offset", "size", "label", "crc")
    return make_index(SAMPLES, {**dict.fromkeys(names, nothing), "class_members": VirtualMembers()})


def order_of(policy: str, index: Index) -> Order:
    if policy == "lanes":
        return LaneOrder(index, 0, lanes=LANES, window=WINDOW, micro_batch=MICRO_BATCH)
    return build_order(TypeAdapter(Sampling).validate_python(POLICIES[policy]), index, 0)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure_rate(policy: str, seconds: float) -> dict[str, float]:
    """Positions per second in large blocks, microseconds of one micro-batch, and memory."""
    index = virtual_index()
    before = resident_mb()
    order = order_of(policy, index)
    # From the middle of the fourth epoch on.
    block = np.arange(BLOCK) + 7 * order.epoch_samples // 2
    order.samples(block)
    done, spent = 0, 0.0
    while spent < seconds:
        started = time.process_time()
        order.samples(block + done)
        spent += time.process_time() - started
        done += BLOCK
    micro = []
    for step in range(200):
        started = time.perf_counter()
        order.samples(np.arange(MICRO_BATCH) + step * MICRO_BATCH)
        micro.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {
        "positions_per_s": round(done / spent),
        "micro_batch_us": round(statistics.median(micro) * 1e6, 1),
        "added_memory_mb": round(peak - before, 1),
    }


def measure_first(policy: str, folder: str) -> dict[str, float]:
    """Seconds from opening the columns to the first micro-batch, at several positions."""
    figures = {}
    for epochs in (0.0, 0.5, 10.0, 10_000.0):
        started = time.perf_counter()
        columns = {p.stem: map_column(p) for p in Path(folder).glob("*.npy")}
        order = order_of(policy, make_index(ON_DISK, columns))
        first = int(epochs * order.epoch_samples)
        samples = order.samples(np.arange(first, first + MICRO_BATCH))
        for name in ("shard", "offset", "size", "crc", "label"):
            columns[name][samples].sum()
        figures[f"epoch_{epochs:g}_s"] = round(time.perf_counter() - started, 4)
    return figures


def write_columns(folder: Path, samples: int) -> None:
    """Columns as files with holes: they have their length, and take no space on the disk."""
    types = {"shard": "u4", "offset": "u8", "size": "u4", "label": "i4", "crc": "u4"}
    for name, dtype in {**types, "class_members": "u4"}.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (samples,))


def in_own_process(*arguments: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--only", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def table(title: str, rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    print(f"{title:26}" + "".join(f"{c:>18}" for c in columns))
    for name, row in rows.items():
        print(f"{name:26}" + "".join(f"{row[c]:18,}" for c in columns))
    print()


def main() -> None:
    parser = benchmark_parser(__doc__, quick="half a second a policy, not ten")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        kind, policy, argument = options.only
        rate = kind == "rate"
        found = measure_rate(policy, float(argument)) if rate else measure_first(policy, argument)
        print(json.dumps(found))
        return
    seconds = "0.5" if options.quick else "10"
    rates = {policy: in_own_process("rate", policy, seconds) for policy in NAMES}
    table(f"{SAMPLES:,} samples", rates)
    with tempfile.TemporaryDirectory() as folder:
        write_columns(Path(folder), ON_DISK)
        firsts = {policy: in_own_process("first", policy, folder) for policy in NAMES}
    table(f"first batch of {ON_DISK:,}", firsts)
    where = machine("bigbatch", "numpy", seconds=seconds)
    write_figures(options.json, machine=where, rates=rates, first_batch=firsts)


if __name__ == "__main__":
    main()
