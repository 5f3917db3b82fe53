"""What an average of the weights adds to a step, and what float32 would make of it.

    python benchmarks/averaging.py [--quick] [--json FILE] [--threads N]

Cost: ResNet-50, one process. In each round a training step, and then one update each, in turns, of
our average (float64), of torch's AveragedModel and of timm's ModelEmaV3 (float32), on the same
weights. Times are those of the processor where that is the device, so that what else the machine
does counts for nothing; medians over the rounds, and each update's share of the step.

Error: the same recurrence in float32 (`lerp_`) and in float64 over weights that drift and
scatter, less from step to step, as in a run whose rate falls: the difference of the two after
four half-lives, at most 100,000 steps, relative to the weights (root mean square, weights of
size 1). Beside it, by the same measure, how far the average is from the newest weights.
"""

import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from machine import benchmark_parser, machine, stopwatch, write_figures
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bigbatch.trainers.engine.ddp import DdpEngine
from bigbatch.trainers.optim.averaging import WeightAverage, newest_share

MODEL, MICRO, SIZE = "resnet50", 32, 128
DECAY = 0.999
HALF_LIVES = (100, 1_000, 10_000, 100_000)  # steps


def cost(rounds: int) -> dict[str, Any]:
    """Milliseconds of a step and of one update of each average."""
    torch.manual_seed(0)
    engine = DdpEngine("fp32", "overlapped")
    model = timm.create_model(MODEL, num_classes=1000)
    engine.prepare(model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), 1)
    images = torch.randn(MICRO, 3, SIZE, SIZE, device=engine.device)
    targets = torch.arange(MICRO, device=engine.device)
    own = WeightAverage(engine.own_weights(), range(1, 10**9), -math.log(DECAY))
    torchs = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    timms = ModelEmaV3(engine.module, decay=DECAY)

    def step() -> None:
        engine.zero_grad()
        with engine.micro_batch(last=True):
            engine.backward(torch.nn.functional.cross_entropy(engine.model(images), targets))
        engine.reduce()
        engine.gradient_norm()
        engine.step()

    updates: dict[str, Callable[[], object]] = {
        "bigbatch": lambda: own.update(1),
        "torch": lambda: torchs.update_parameters(engine.module),
        "timm": lambda: timms.update(engine.module),
    }
    timed = stopwatch(on_gpu=engine.device.type == "cuda")
    times: dict[str, list[float]] = {name: [] for name in ("step", *updates)}
    for number in range(-2, rounds):
        names = list(updates)
        for name in ("step", *names[number % 3 :], *names[: number % 3]):
            seconds, _ = timed(step if name == "step" else updates[name])
            if number >= 0:
                times[name].append(seconds)
    middle = {name: statistics.median(values) for name, values in times.items()}
    shares = {
        name: statistics.median(a / b for a, b in zip(times[name], times["step"], strict=True))
        for name in updates
    }
    return {
        "step_ms": round(1e3 * middle["step"], 1),
        "update_ms": {name: round(1e3 * middle[name], 2) for name in updates},
        "share_of_step": {name: round(share, 5) for name, share in shares.items()},
    }


@torch.no_grad()
def error(half_life: int, count: int = 2_000) -> dict[str, float]:
    """What float32 is off by, and what there is to be off from."""
    generator = torch.Generator().manual_seed(0)
    weights, rate = torch.randn(count, generator=generator).sign(), math.log(2) / half_life
    steps = min(4 * half_life, 100_000)
    single, double = torch.zeros(count), torch.zeros(count, dtype=torch.float64)
    scatter = torch.zeros(count)
    for step in range(1, steps + 1):
        done = step / steps
        fresh = torch.randn(count, generator=generator)
        scatter = 0.9 * scatter + 3e-4 * (1 - done) * fresh
        at = weights * (1 + 0.1 * done) + scatter
        share = newest_share(step, rate)
        single.lerp_(at, share)
        double.lerp_(at.double(), share)
    off, lag = single.double() - double, at.double() - double
    return {name: float(x.square().mean().sqrt()) for name, x in (("float32", off), ("lag", lag))}


def main() -> None:
    parser = benchmark_parser(__doc__, quick="2 rounds instead of 12, two half-lives instead of 4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = 2 if options.quick else 12
    figures: dict[str, Any] = {"cost": cost(rounds), "error": {}}
    for half_life in HALF_LIVES[:2] if options.quick else HALF_LIVES:
        found = error(half_life)
        figures["error"][str(half_life)] = {n: float(f"{x:.2g}") for n, x in found.items()}
    print(json.dumps(figures, indent=1))
    where = machine(
        *("bigbatch", "timm", "torch"),
        threads=options.threads,
        model=f"{MODEL}, {MICRO} images of {SIZE} pixels a step, SGD with momentum",
        rounds=rounds,
    )
    write_figures(options.json, machine=where, figures=figures)


if __name__ == "__main__":
    main()
