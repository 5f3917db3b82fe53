"""Learning-rate schedules as pure functions of the step. Free of torch.

Each gives the factor that multiplies optimizer.lr for the step about to be taken, counted
from 0 in optimizer steps of the global batch: never per process, never per micro-batch.
"""

import math
from collections.abc import Callable

from bigbatch.configs.errors import UserError
from bigbatch.configs.schedules import Schedule


def build_schedule(
    config: Schedule, *, total_steps: int, global_batch: int, epoch_samples: int
) -> Callable[[int], float]:
    """The schedule of a run of `total_steps` steps. Raises UserError where warmup fills it."""
    warmup = config.warmup.steps(global_batch, epoch_samples)
    _check_warmup("schedule.warmup", warmup, total_steps)
    if config.name == "constant":
        return lambda step: _ramp(step, warmup, config.warmup_start)
    if config.name == "cosine":
        return lambda step: (
            _ramp(step, warmup, config.warmup_start)
            if step < warmup
            else _cosine(step - warmup, total_steps - warmup, config.final)
        )
    rewarmup = config.rewarmup.steps(global_batch, epoch_samples)
    length = math.ceil(total_steps / config.cycles)
    _check_warmup("schedule.warmup", warmup, length)
    _check_warmup("schedule.rewarmup", rewarmup, length)

    def cycles(step: int) -> float:
        number, place = divmod(step, length)
        ramp = rewarmup if number else warmup
        if place < ramp:
            return _ramp(place, ramp, 0.0 if number else config.warmup_start)
        size = min(length, total_steps - number * length)
        return _cosine(place - ramp, size - ramp, config.final)

    return cycles


def cycle_ends(config: Schedule, total_steps: int) -> list[int]:
    """Counts of finished steps at which a cycle ends; none for a schedule without cycles."""
    if config.name != "cycles":
        return []
    length = math.ceil(total_steps / config.cycles)
    return sorted({min(n * length, total_steps) for n in range(1, config.cycles + 1)})


def _ramp(step: int, warmup: int, start: float) -> float:
    """Linear from `start` to 1, which is reached in the last step of the warmup."""
    return start + (1 - start) * min(1.0, (step + 1) / warmup) if warmup else 1.0


def _cosine(step: int, steps: int, final: float) -> float:
    """Half a cosine from 1 at step 0 towards `final` after `steps` steps."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


def _check_warmup(name: str, warmup: int, steps: int) -> None:
    if warmup >= steps:
        raise UserError(
            f"{name} takes {warmup} steps, but only {steps} steps are there to hold it; "
            "shorten it or lengthen duration"
        )
