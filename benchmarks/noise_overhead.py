"""What the gradient noise scale adds to a training step.

    python benchmarks/noise_overhead.py [--quick] [--json FILE] [--threads N]

Two copies of a model train on the same random images through the real engine, one with the
measurement and one without it (its norms not taken, DDP's own all-reduce instead of the
communication hook), a step each in turns and in changing order. Two figures, each the median
over the rounds with a bootstrap's 95 % interval:

    added    elapsed time of a step with the measurement over that of the one without it,
             in the same round, less one
    inside   of the time of a step, the part spent in the measurement's own calls

On a GPU, where calls only queue work, `added` decides. On a CPU steps scatter by more than the
limit and `inside` decides, whose two times are of the same step. Cases: both reductions; one
process, which accumulates gradients, and two, with one and with two micro-batches each. A case
ends after its rounds, or after a minute.
"""

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import timm
import torch
import torch.multiprocessing as mp
from machine import benchmark_parser, machine, write_figures
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bigbatch.trainers.advice.noise_scale import NoiseScale
from bigbatch.trainers.engine import ddp as engine_module
from bigbatch.trainers.engine.ddp import DdpEngine
from bigbatch.trainers.engine.gradient_norms import MicroBatchNorms

MODEL, MICRO, SIZE = "resnet18", 32, 64
# (ranks, reduction, micro-batches in a step)
CASES = [
    (1, "exact", 2),
    (1, "overlapped", 2),
    (2, "exact", 2),
    (2, "overlapped", 2),
    (2, "overlapped", 4),
]
LIMIT = 0.02  # of the step, the design's
ROUNDS, LEAST, SECONDS = 60, 8, 55.0  # of a case: most and fewest rounds, and when to end

# Of a step: elapsed seconds, and those of them spent inside the measurement's calls.
Times = tuple[float, float]


inside = 0.0  # seconds of this process
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def timed(call: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The same call; its time counts as the measurement's."""

    def timed_call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        global inside
        started = time.perf_counter()
        result = call(*arguments, **options)
        inside += time.perf_counter() - started
        return result

    return timed_call


class TimedNorms(MicroBatchNorms):
    add = timed(MicroBatchNorms.add)


class NoNorms(MicroBatchNorms):
    def add(self, gradients: object) -> None:
        pass


@contextmanager
def norms_by(kind: type[MicroBatchNorms]) -> Iterator[None]:
    """Engines prepared inside measure by `kind`; with NoNorms, DDP keeps its own all-reduce."""
    register = DistributedDataParallel.register_comm_hook
    engine_module.MicroBatchNorms = kind  # type: ignore[misc]
    if kind is NoNorms:
        DistributedDataParallel.register_comm_hook = lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        engine_module.MicroBatchNorms = MicroBatchNorms  # type: ignore[misc]
        DistributedDataParallel.register_comm_hook = register  # type: ignore[method-assign]


def make_step(reduction: str, micro_batches: int, measured: bool) -> Callable[[], Times]:
    """A training step that returns its times."""
    engine = DdpEngine("fp32", reduction)
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with norms_by(TimedNorms if measured else NoNorms):
        engine.prepare(model, optimizer, micro_batches)
    images = torch.randn(MICRO, 3, SIZE, SIZE, device=engine.device)
    labels = torch.randint(1000, (MICRO,), device=engine.device)
    mine = range(engine.rank, micro_batches, engine.world)
    noise = NoiseScale(MICRO, MICRO * micro_batches)
    rank_share, update = timed(engine.micro_batch_sq), timed(noise.update)

    def step() -> Times:
        engine.barrier()
        started, before = time.perf_counter(), inside
        engine.zero_grad()
        for number in mine:
            with engine.micro_batch(last=number == mine[-1]):
                engine.backward(nn.functional.cross_entropy(engine.model(images), labels))
        engine.reduce()
        agreed = [torch.zeros((), dtype=torch.float64, device=engine.device)]
        if measured:
            agreed.append(rank_share())
        totals = engine.sum(torch.stack(agreed))
        values = torch.cat([totals, engine.gradient_norm().view(1)]).tolist()
        if measured:
            update(values[1] / engine.micro_batches_measured, values[-1])
        engine.step()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, inside - before

    return step


def measure(reduction: str, micro_batches: int, rounds: int) -> list[tuple[Times, Times]]:
    """Times of a step with and without the measurement, a pair for each round.

    Either copy is the first to be made in half of the rounds: where its memory lies can
    weigh more than the measurement.
    """
    pairs: list[tuple[Times, Times]] = []
    for made_first in (True, False):
        order = (made_first, not made_first)
        steps = {measured: make_step(reduction, micro_batches, measured) for measured in order}
        end = time.monotonic() + SECONDS / 2
        for number in range(-2, rounds // 2):
            times = {measured: steps[measured]() for measured in (order, order[::-1])[number % 2]}
            if number >= 0:
                pairs.append((times[True], times[False]))
            over = [time.monotonic() > end]
            if torch.distributed.is_initialized():
                torch.distributed.broadcast_object_list(over)  # all ranks end together
            if over[0] and number >= LEAST // 2:
                break
    return pairs


def median_and_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and a bootstrap's 95 % interval of it."""
    samples = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(samples, axis=1), (2.5, 97.5))
    return float(np.median(values)), float(low), float(high)


def rank_main(rank: int, world: int, port: int, threads: int, rounds: int, found: str) -> None:
    shared = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if world > 1:
        os.environ |= {k: str(v) for k, v in shared.items()}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(threads)
    results = {
        f"{world} ranks, {reduction}, {count} micro-batches": measure(reduction, count, rounds)
        for ranks, reduction, count in CASES
        if ranks == world
    }
    if rank == 0:
        Path(found).write_text(json.dumps(results))
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    os._exit(0)  # torch's threads now and then abort an interpreter on its way out


def run(world: int, threads: int, rounds: int) -> dict[str, list[tuple[Times, Times]]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        found = str(Path(folder) / "found.json")
        mp.spawn(rank_main, (world, port, threads, rounds, found), nprocs=world)
        result: dict[str, list[tuple[Times, Times]]] = json.loads(Path(found).read_text())
    return result


def main() -> None:
    parser = benchmark_parser(__doc__, quick="6 rounds instead of 60")
    parser.add_argument("--threads", type=int, default=1, help="of each rank, on a CPU")
    options = parser.parse_args()
    rounds = 6 if options.quick else ROUNDS
    figures: dict[str, Any] = {}
    gpus = torch.cuda.device_count()
    decides = "added" if gpus else "inside"
    worlds = [w for w in (1, 2) if not gpus or w <= gpus]  # ranks do not share a GPU under NCCL
    for world in worlds:
        for name, pairs in run(world, options.threads, rounds).items():
            ratios = {"added": [a[0] / b[0] - 1 for a, b in pairs]}
            if not gpus:
                ratios["inside"] = [a[1] / a[0] for a, _ in pairs]
            row: dict[str, Any] = {
                "step_ms": round(statistics.median(b[0] for _, b in pairs) * 1e3, 3),
                "rounds": len(pairs),
            }
            shown = f"{name:36}{row['step_ms']:8.1f} ms {row['rounds']:3} rounds"
            for kind, values in ratios.items():
                middle, low, high = median_and_interval(values)
                row[kind] = {"share": round(middle, 5), "interval": [round(low, 5), round(high, 5)]}
                shown += f"  {kind} {middle:+.2%} ({low:+.2%} to {high:+.2%})"
            print(shown, flush=True)
            figures[name] = row
    where = machine(
        *("bigbatch", "timm", "torch"),
        threads=options.threads,
        model=f"{MODEL}, {MICRO} images of {SIZE} pixels a micro-batch",
        rounds=rounds,
    )
    write_figures(options.json, machine=where, figures=figures)
    if not options.quick and any(row[decides]["share"] > LIMIT for row in figures.values()):
        sys.exit(f"more than {LIMIT:.0%} of a step")


if __name__ == "__main__":
    main()
