"""What recording each sample adds to a training step (`log.samples=true`).

    python benchmarks/samples.py [--quick] [--json FILE] [--threads N]

One process, the real engine (`reduction: exact`), loss and writer. In each round a step of one
micro-batch that is recorded and one that is not, in changing order, on the same network. Times are
the processor's where that is the device; medians over the rounds. Of each net:

    micro_ms    a micro-batch forward and backward, not recorded
    rest_ms     the rest of a step: reduction, norm, update
    see_ms      what recording adds to a micro-batch: losses by sample, margins, p(true), packed
    write_ms    the rest of a step of 256 images: sum by name, unpacking, the write
    share       both of a step of 256 images, over micro_ms times its micro-batches, and rest_ms
    added       the time of a step that is recorded over that of one that is not, less one, as
                measured, of steps of one micro-batch

It grows with images and classes, and a step with images times pixels times weights: so few, small
images and many classes pay the largest share.
"""

import json
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from machine import benchmark_parser, machine, stopwatch, write_figures
from torch import nn

from bigbatch.configs.losses import CrossEntropy
from bigbatch.configs.optimizers import LARS
from bigbatch.configs.timeline import Timeline
from bigbatch.data.batch import MicroBatch
from bigbatch.trainers.dynamics.record import SampleRecords
from bigbatch.trainers.engine.ddp import DdpEngine
from bigbatch.trainers.losses.build import Course, build_objective
from bigbatch.trainers.monitoring.jsonl import Appending
from bigbatch.trainers.optim import build_optimizer

GLOBAL_BATCH = 256
# Network, channels, pixels, classes, images of a micro-batch, rounds
CASES = [
    ("test_resnet", 1, 32, 10, 64, 40),
    ("resnet18", 3, 64, 100, 32, 12),
    ("resnet50", 3, 224, 1000, 8, 4),
]
Case = tuple[str, int, int, int, int, int]


class Step:
    """A step of one micro-batch, recorded or not; seconds by part."""

    def __init__(self, case: Case, folder: Path) -> None:
        name, channels, size, classes, images, _ = case
        engine = self.engine = DdpEngine("fp32", "exact")
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=classes, in_chans=channels)
        engine.prepare(model, build_optimizer(model, LARS(name="lars", lr=0.01)), 1)
        device = engine.device
        self.timed = stopwatch(on_gpu=device.type == "cuda")
        self.images = torch.randn(images, channels, size, size, device=device)
        self.labels = torch.randint(classes, (images,), device=device)
        self.targets = nn.functional.one_hot(self.labels, classes).float()
        self.course = Course()
        self.objective = build_objective(CrossEntropy(), course=self.course)
        file = Appending(folder / "samples.f16")
        line = Timeline.constant(GLOBAL_BATCH, 10**9)
        job: Any = SimpleNamespace(
            recipe=SimpleNamespace(log=SimpleNamespace(samples=True), micro_batch=images),
            engine=engine,
            course=self.course,
            inputs=SimpleNamespace(plan=SimpleNamespace(timeline=line)),
        )
        log: Any = SimpleNamespace(samples=file.append_bytes)
        self.records = SampleRecords(job, log)
        nothing = torch.zeros(0, dtype=torch.uint8), torch.zeros((0, 2), dtype=torch.int32)
        samples = np.arange(images)
        self.batch = MicroBatch(0, 0, samples, self.labels, *nothing, channels)

    def __call__(self, recorded: bool) -> dict[str, float]:
        engine, records, course = self.engine, self.records, self.course
        course.listens = recorded

        def micro() -> None:
            with engine.micro_batch(last=True):
                loss = self.objective(engine.model, self.images, self.targets)
                if recorded:
                    records.see(self.batch)
                engine.backward(loss)

        def write() -> None:
            totals = engine.sum_by_name({"samples": records.share(0)})
            records.write(totals["samples"], updated=True)

        def update() -> None:
            engine.gradient_norm()
            engine.step()

        engine.zero_grad()
        times = {"micro": self.timed(micro)[0], "rest": self.timed(engine.reduce)[0]}
        times["write"] = self.timed(write)[0] if recorded else 0.0
        times["rest"] += self.timed(update)[0]
        return times

    def see(self, recorded: bool, calls: int) -> float:
        """Seconds of the loss alone, of logits that are there, with what recording adds."""
        logits = torch.randn(self.targets.shape, device=self.engine.device)
        self.course.listens = recorded

        def several() -> None:
            for _ in range(calls):
                self.objective(lambda _: logits, self.images, self.targets)  # type: ignore[arg-type]
                if recorded:
                    self.records.see(self.batch)

        return self.timed(several)[0] / calls


def measure(case: Case, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        step = Step(case, Path(folder))
        pairs, added = [], []
        for number in range(-1, rounds):
            order = (True, False) if number % 2 else (False, True)
            found = {recorded: step(recorded) for recorded in order}
            alone = {recorded: step.see(recorded, 20) for recorded in order}
            if number >= 0:
                pairs.append((found[True], found[False]))
                added.append(alone[True] - alone[False])
    middle = statistics.median
    micro, see = middle(off["micro"] for _, off in pairs), middle(added)
    write = middle(on["write"] for on, _ in pairs)
    rest = middle(x["rest"] for pair in pairs for x in pair)
    many = GLOBAL_BATCH // case[4]
    return {
        "micro_ms": round(1e3 * micro, 2),
        "rest_ms": round(1e3 * rest, 2),
        "see_ms": round(1e3 * see, 4),
        "write_ms": round(1e3 * write, 4),
        "share": round((many * see + write) / (many * micro + rest), 5),
        "added": round(middle(sum(on.values()) / sum(off.values()) - 1 for on, off in pairs), 4),
        "rounds": len(pairs),
    }


def main() -> None:
    parser = benchmark_parser(__doc__, quick="2 rounds, and the smallest net alone")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = {}
    for case in CASES[:1] if options.quick else CASES:
        name = f"{case[0]}, {case[2]} pixels, {case[3]} classes, micro-batches of {case[4]}"
        figures[name] = measure(case, 2 if options.quick else case[5])
        print(name, json.dumps(figures[name]), flush=True)
    where = machine(*("bigbatch", "timm", "torch"), threads=options.threads, images=GLOBAL_BATCH)
    write_figures(options.json, machine=where, figures=figures)


if __name__ == "__main__":
    main()
