"""Learning-rate schedules as pure functions of the step. Free of torch."""

import math
from collections.abc import Callable

from bigbatch.configs import schedules as c
from bigbatch.configs.errors import UserError

Factor = Callable[[int], float]


def build_schedule(
    config: c.Schedule, total_steps: int, global_batch: int, epoch_samples: int
) -> Factor:
    """The function step -> factor that multiplies the learning rate of that step.

    `step` is the number of finished steps, so 0 for the first one; it counts optimizer
    steps, whatever the number of processes. `total_steps` is the length of the run.
    Raises UserError where the schedule does not fit into the run.
    """
    warmup = config.warmup.steps(global_batch, epoch_samples)
    match config:
        case c.Constant():
            _fits("warmup", warmup, "the run", total_steps)
            return lambda t: _warmup(t, warmup, config.warmup_start) if t < warmup else 1.0
        case c.Cosine():
            _fits("warmup", warmup, "the run", total_steps)
            return lambda t: _warm_cosine(t, total_steps, warmup, config.warmup_start, config.final)
        case c.Cycles():
            rewarmup = config.rewarmup.steps(global_batch, epoch_samples)
            ends = cycle_ends(config, total_steps)
            starts = [0, *ends[:-1]]
            for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
                name, steps = ("warmup", warmup) if i == 0 else ("rewarmup", rewarmup)
                _fits(name, steps, f"cycle {i + 1}", end - start)

            def cycles(t: int) -> float:
                i = sum(end <= min(t, total_steps - 1) for end in ends)
                w = rewarmup if i else warmup
                length = ends[i] - starts[i]
                return _warm_cosine(t - starts[i], length, w, config.warmup_start, config.final)

            return cycles


def cycle_ends(config: c.Schedule, total_steps: int) -> list[int]:
    """Numbers of finished steps at which a snapshot is due; [] for schedules without cycles.

    Cycle i of M ends after ceil(i T / M) steps. Where M divides T these are the cycles of
    Huang et al. 2017; where it does not, their ceil(T / M) for each would leave the last
    cycle cut off, or missing.
    """
    if not isinstance(config, c.Cycles):
        return []
    if config.cycles > total_steps:
        raise UserError(
            f"schedule.cycles = {config.cycles} for a run of {total_steps} steps: a cycle needs "
            "at least one step; use fewer cycles or a longer duration"
        )
    return [-(-i * total_steps // config.cycles) for i in range(1, config.cycles + 1)]


def _warmup(t: int, steps: int, start: float) -> float:
    """Linear from `start` at step 0 to 1 at step `steps`."""
    return start + (1.0 - start) * t / steps


def _warm_cosine(t: int, steps: int, warmup: int, start: float, final: float) -> float:
    """Linear warmup, then half a cosine that reaches `final` at step `steps` (SGDR, eq. 5)."""
    if t < warmup:
        return _warmup(t, warmup, start)
    if t >= steps:
        return final
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * (t - warmup) / (steps - warmup)))


def _fits(name: str, steps: int, where: str, length: int) -> None:
    if steps >= length and steps > 0:
        raise UserError(
            f"schedule.{name} takes {steps} steps, but {where} has {length}: "
            "shorten it or train longer"
        )
