"""What saving takes from training: ResNet-50 with momentum, on a CPU, one process.

    python benchmarks/saving.py [--quick] [--json FILE] [--threads N]

Rounds of the same training steps, in turns: without saving, with our background saving, and
with torch.save in the loop, which most training scripts do. The checkpoint is taken after a
round's first step, and the round lasts longer than the write. What a round takes beyond one
without saving is the cost of one checkpoint: the pause and all that the background takes.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from machine import benchmark_parser, machine, write_figures

from bigbatch.trainers.engine.ddp import DdpEngine
from bigbatch.trainers.models.weights_file import WeightsInfo
from bigbatch.trainers.recovery.checkpoint import TrainState
from bigbatch.trainers.recovery.saving import Saver
from bigbatch.trainers.recovery.stored import Retention

MODEL, MICRO, SIZE = "resnet50", 16, 96


class Times:
    """The log's part in saving: keeps what it is told."""

    def __init__(self) -> None:
        self.stall_s: list[float] = []
        self.write_s: list[float] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.stall_s.append(fields["stall_s"])
        self.write_s.append(fields["write_s"])

    def error(self, kind: str, message: str, **fields: Any) -> None:
        raise RuntimeError(message)

    def sync(self) -> None:
        pass


def main() -> None:
    parser = benchmark_parser(__doc__, quick="2 rounds of each instead of 6")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    engine = DdpEngine("fp32", "overlapped")
    model = timm.create_model(MODEL, num_classes=1000)
    engine.prepare(model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), 1)
    images, targets = torch.randn(MICRO, 3, SIZE, SIZE), torch.arange(MICRO)

    def step() -> None:
        engine.zero_grad()
        with engine.micro_batch(last=True):
            engine.backward(torch.nn.functional.cross_entropy(engine.model(images), targets))
        engine.reduce()
        engine.gradient_norm()
        engine.step()

    classes = tuple(map(str, range(1000)))
    info = WeightsInfo(MODEL, classes, (0.5,) * 3, (0.25,) * 3, SIZE, 3)  # sealed, as a run's are
    state = TrainState(0, engine.module, engine.optimizer, None, {}, info=info)
    times: dict[str, list[float]] = {"none": [], "background": [], "torch.save": []}
    peer_stall: list[float] = []
    for _ in range(3):
        step()
    began = time.perf_counter()
    step()
    steps = max(4, round(5 / (time.perf_counter() - began)))
    with tempfile.TemporaryDirectory() as name:
        log = Times()
        with Saver(Path(name), engine, log, Retention(1)) as saver:  # type: ignore[arg-type]
            saver.save(state, last=True)  # the first one also allocates its memory
            for number in range(2 if options.quick else 6):
                ways = list(times)
                for way in ways[number % 3 :] + ways[: number % 3]:
                    started = time.perf_counter()
                    step()
                    if way == "background":
                        state.step += 1
                        saver.save(state)
                    elif way == "torch.save":
                        before = time.perf_counter()
                        peer_save(state, Path(name) / "peer.pt")
                        peer_stall.append(time.perf_counter() - before)
                    for _ in range(steps - 1):
                        step()
                    times[way].append(time.perf_counter() - started)
                    saver.report()
        size = sum(p.stat().st_size for p in Path(name).glob("step-*/*"))
    pairs = {w: [a - b for a, b in zip(times[w], times["none"], strict=True)] for w in times}
    figures = {
        "checkpoint_mb": round(size / 1e6, 1),
        "round_s": round(statistics.median(times["none"]), 3),
        "steps_in_a_round": steps,
        "background": {
            "stall_s_median": round(statistics.median(log.stall_s[1:]), 4),
            "stall_s_max": max(log.stall_s[1:]),
            "write_s_median": round(statistics.median(log.write_s[1:]), 3),
            "cost_s": round(statistics.median(pairs["background"]), 3),
            "share_at_one_a_minute": round(statistics.median(pairs["background"]) / 60, 5),
        },
        "torch.save": {
            "stall_s_median": round(statistics.median(peer_stall), 4),
            "cost_s": round(statistics.median(pairs["torch.save"]), 3),
            "share_at_one_a_minute": round(statistics.median(pairs["torch.save"]) / 60, 5),
        },
    }
    print(json.dumps(figures, indent=1))
    where = machine(
        *("bigbatch", "timm", "torch"),
        threads=options.threads,
        model=f"{MODEL}, {MICRO} images of {SIZE} pixels a step, SGD with momentum",
        rounds=len(times["none"]),
    )
    write_figures(options.json, machine=where, figures=figures)


def peer_save(state: TrainState, path: Path) -> None:
    """torch.save of the same state, on the disk at the return, as ours is at its end."""
    content = {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
