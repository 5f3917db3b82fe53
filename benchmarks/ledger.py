"""What a ledger's line adds to a training step.

    python benchmarks/ledger.py [--quick] [--json FILE] [--threads N]

One process, the real engine (`reduction: exact`) and the writer that runs use: sample keys,
gradient, weights, optimizer and buffers digested, the line chained and written. In each round a
step of one micro-batch with a line and one without, in changing order, on the same network. Times
are the processor's where that is the device, so that what else the machine does counts for
little; medians over the rounds. Of each net:

    micro_ms    a micro-batch forward and backward
    rest_ms     the rest of a step: reduction, norm, update
    ledger_ms   all calls of the ledger in a step
    added       the time of a step with a line over that of one without, less one, as measured,
                of steps of one micro-batch
    share       ledger_ms of a step of 256 images: micro_ms times its micro-batches, and rest_ms

A line costs the same whatever the step: it grows with the weights, and the step with weights times
images times pixels. So small nets and small batches pay the largest share.

With --swapped instead what swapped recomputation adds, every 100 steps (ledger_swapped.py): step_ms
of a step without, check_ms beyond that, and the share of a check every 100 steps.
"""

import json
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ledger_swapped
import numpy as np
import timm
import torch
from machine import benchmark_parser, machine, stopwatch, write_figures
from torch import nn

from bigbatch.configs.losses import CrossEntropy
from bigbatch.configs.optimizers import LAMB, LARS
from bigbatch.data.batch import MicroBatch
from bigbatch.trainers.engine.ddp import DdpEngine
from bigbatch.trainers.ledger.record import LedgerWriter
from bigbatch.trainers.monitoring.jsonl import JsonLines
from bigbatch.trainers.optim import build_optimizer

GLOBAL_BATCH = 256
# Network, channels, pixels, images of a micro-batch, rounds
CASES = [
    ("test_resnet", 1, 32, 64, 24),
    ("resnet18", 3, 64, 32, 8),
    ("resnet50", 3, 224, 4, 4),
]
OPTIMIZERS = {
    "lars": LARS(name="lars", lr=0.01),
    "lamb": LAMB(name="lamb", lr=1e-4),
}


class Lines:
    """The log's part in it."""

    def __init__(self, path: Path) -> None:
        self._file = JsonLines(path)

    def ledger(self, line: dict[str, Any]) -> None:
        self._file.append(line)


class Step:
    """A step of one micro-batch, with or without a line; seconds by part."""

    def __init__(self, case: tuple[str, int, int, int, int], optimizer: str, folder: Path) -> None:
        name, channels, size, images, _ = case
        engine = self.engine = DdpEngine("fp32", "exact")
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=100, in_chans=channels)
        engine.prepare(model, build_optimizer(model, OPTIMIZERS[optimizer]), 1)
        device = engine.device
        self.timed = stopwatch(on_gpu=device.type == "cuda")
        self.images = torch.randn(images, channels, size, size, device=device)
        self.labels = torch.randint(100, (images,), device=device)
        log = SimpleNamespace(ledger_every=1)
        job: Any = SimpleNamespace(
            recipe=SimpleNamespace(log=log, micro_batch=images, backend="ddp", loss=CrossEntropy()),
            engine=engine,
            inputs=SimpleNamespace(splits={}, plan=SimpleNamespace(total=10**9)),
            run=SimpleNamespace(ledger=folder / "ledger.jsonl", metrics=folder / "metrics.jsonl"),
            state=SimpleNamespace(step=0, fingerprint={"order_hash": ""}),
        )
        lines: Any = Lines(folder / "ledger.jsonl")
        self.ledger = LedgerWriter(job, lines)
        self.number = 0

    def __call__(self, measured: bool) -> dict[str, float]:
        engine, ledger, images = self.engine, self.ledger, len(self.images)
        step = self.number = self.number + 1

        def micro() -> None:
            with engine.micro_batch(last=True):
                engine.backward(nn.functional.cross_entropy(engine.model(self.images), self.labels))

        def see() -> None:
            for index in range(GLOBAL_BATCH // images):  # of a step of the global batch
                samples = np.arange(images) + index * images
                labels = torch.zeros(images, dtype=torch.int64)
                empty = torch.zeros(0, dtype=torch.uint8)
                sizes = torch.zeros((images, 2), dtype=torch.int32)
                ledger.see(MicroBatch(step - 1, index, samples, labels, empty, sizes, 3))

        def update() -> None:
            engine.gradient_norm()
            engine.step()

        engine.zero_grad()
        times = {"micro": self.timed(micro)[0], "rest": self.timed(engine.reduce)[0]}
        times["ledger"] = 0.0
        if measured:
            spent, _ = self.timed(see)
            shared, part = self.timed(lambda: ledger.share(step, None))
            agreed, _ = self.timed(lambda: ledger.agree(step, part.tolist(), 1.0))
            times["ledger"] = spent + shared + agreed
        times["rest"] += self.timed(update)[0]
        if measured:  # the state, which the next step's all-reduce would tell
            times["ledger"] += self.timed(lambda: ledger.save(None))[0]
        return times


def measure(case: tuple[str, int, int, int, int], optimizer: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        step = Step(case, optimizer, Path(folder))
        pairs = []
        for number in range(-1, rounds):
            order = (True, False) if number % 2 else (False, True)
            found = {measured: step(measured) for measured in order}
            if number >= 0:
                pairs.append((found[True], found[False]))
    line = statistics.median(on["ledger"] for on, _ in pairs)
    micro = statistics.median(x["micro"] for pair in pairs for x in pair)
    rest = statistics.median(x["rest"] for pair in pairs for x in pair)
    added = statistics.median(sum(on.values()) / sum(off.values()) - 1 for on, off in pairs)
    parameters = sum(p.numel() for p in step.engine.module.parameters())
    whole = micro * (GLOBAL_BATCH // case[3]) + rest
    return {
        "parameters": parameters,
        "micro_ms": round(1e3 * micro, 2),
        "rest_ms": round(1e3 * rest, 2),
        "ledger_ms": round(1e3 * line, 2),
        "ns_per_parameter": round(1e9 * line / parameters, 2),
        "added": round(added, 4),
        "share": round(line / whole, 5),
        "rounds": len(pairs),
    }


def main() -> None:
    parser = benchmark_parser(__doc__, quick="2 rounds, and the smallest net alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--swapped", action="store_true", help="of swapped recomputation")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {}
    if options.swapped:
        with tempfile.TemporaryDirectory() as folder:
            for part in ledger_swapped.CASES[:1] if options.quick else ledger_swapped.CASES:
                rounds = 4 if options.quick else part[-1]
                name = ledger_swapped.name_of(part)
                figures[name] = ledger_swapped.measure(part, Path(folder), rounds)
                print(name, json.dumps(figures[name]), flush=True)
        where = machine(*("bigbatch", "timm", "torch"), threads=options.threads)
        write_figures(options.json, machine=where, figures=figures)
        return
    for case in CASES[:1] if options.quick else CASES:
        for optimizer in OPTIMIZERS:
            name = f"{case[0]}, {case[2]} pixels, micro-batches of {case[3]}, {optimizer}"
            figures[name] = measure(case, optimizer, 2 if options.quick else case[4])
            print(name, json.dumps(figures[name]), flush=True)
    where = machine(*("bigbatch", "timm", "torch"), threads=options.threads, images=GLOBAL_BATCH)
    write_figures(options.json, machine=where, figures=figures)


if __name__ == "__main__":
    main()
