"""Learning-rate schedules as pure functions of the step. Free of torch.

A schedule maps the number of finished steps to the factor of the coming step's learning
rate. It counts optimizer steps of the global batch: never per process, never per
micro-batch, so no world size ends a warmup early.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise

from bigbatch.configs import schedules as c
from bigbatch.configs.durations import Length
from bigbatch.configs.errors import UserError
from bigbatch.data.rng import uniforms
from bigbatch.trainers.planning.plateau import Evaluations, plateau

LrMultiplier = Callable[[int], float]


def build_schedule(
    config: c.Schedule,
    total_steps: int,
    global_batch: int,
    epoch_samples: int,
    *,
    evaluations: Evaluations = (),
    place: Callable[[int], int] = lambda step: step,
    first_step: int = 0,
) -> LrMultiplier:
    """The function step -> factor that multiplies the learning rate of that step.

    `step` is the number of finished steps, so 0 for the first one. `total_steps` is the
    length of the run; `global_batch` and `epoch_samples` turn durations into steps. Steps
    after the end keep the factor that the schedule ends on. A schedule with a plateau is a
    function of `evaluations` as well: pass a list that grows as the run measures them, and in
    `place` where in the schedule a step of the run stands. `first_step` is where in the run the
    schedule's own step 0 stands.
    Raises UserError where the schedule does not fit into the run.
    """

    def steps(length: Length) -> int:
        return length.steps(global_batch, epoch_samples)

    def inner(part: c.Schedule, total: int, start: int = 0) -> LrMultiplier:
        return build_schedule(
            part,
            total,
            global_batch,
            epoch_samples,
            evaluations=evaluations,
            place=place,
            first_step=first_step + start,
        )

    match config:
        case c.OneCycle():
            return _one_cycle(config, total_steps)
        case c.Sequence():
            return _sequence(config, total_steps, steps, inner)
        case c.Product():
            lr_multipliers = [inner(part, total_steps) for part in config.factors]
            return lambda t: math.prod(lr_multiplier(t) for lr_multiplier in lr_multipliers)
        case c.Cycles():
            return _cycles(config, total_steps, steps)
    warmup = steps(config.warmup)
    _check_warmup("warmup", warmup, "the run", total_steps)
    rest = total_steps - warmup
    # Named places in the run (30 epochs, then 60) count from its start; shapes that decay
    # over a length count from the end of the warmup.
    match config:
        case c.Step():
            every = steps(config.every)
            return _warmed(config, warmup, lambda t: config.gamma ** ((t + warmup) // every))
        case c.MultiStep():
            marks = _ascending("milestones", config.milestones, steps)
            return _warmed(
                config, warmup, lambda t: config.gamma ** bisect_right(marks, t + warmup)
            )
        case c.PiecewiseConstant():
            marks = _ascending("boundaries", config.boundaries, steps)
            return _warmed(config, warmup, lambda t: config.values[bisect_right(marks, t + warmup)])
        case c.Plateau():
            start = first_step + warmup
            return _warmed(
                config, warmup, lambda t: plateau(config, evaluations, start, start + t, place)
            )
        case c.Constant():
            return _warmed(config, warmup, lambda t: 1.0)
        case c.Cosine():
            return _warmed(config, warmup, lambda t: cosine(t, rest, config.final))
        case c.LinearCosine():
            return _warmed(config, warmup, lambda t: _linear_cosine(config, t, rest))
        case c.Polynomial():
            length = rest if config.length is None else steps(config.length)
            return _warmed(config, warmup, lambda t: _polynomial(config, t, length))
        case c.Triangular():
            rise = steps(config.rise)
            return _warmed(config, warmup, lambda t: _triangular(config, t, rise))
        case c.Exponential():
            every = steps(config.every)
            return _warmed(config, warmup, lambda t: config.rate ** _periods(config, t, every))
        case c.NaturalExponential():
            every = steps(config.every)
            return _warmed(
                config, warmup, lambda t: math.exp(-config.rate * _periods(config, t, every))
            )
        case c.InverseTime():
            every = steps(config.every)
            return _warmed(
                config, warmup, lambda t: 1.0 / (1.0 + config.rate * _periods(config, t, every))
            )


def cycle_ends(config: c.Schedule, total_steps: int) -> list[int]:
    """Numbers of finished steps at which a snapshot is due; [] for schedules without cycles.

    Cycle i of M ends after ceil(i T / M) steps, or in proportion to 1, mult, mult^2, ...
    Where M divides T these are the cycles of Huang et al. 2017; where it does not, their
    ceil(T / M) for each would leave the last cycle cut off, or missing.
    """
    if not isinstance(config, c.Cycles):
        return []
    weights = [config.mult**i for i in range(config.cycles)]
    total = sum(weights)
    ends = [-(-sum(weights[:i]) * total_steps // total) for i in range(1, config.cycles + 1)]
    if any(start >= end for start, end in pairwise([0, *ends])):
        raise UserError(
            f"schedule.cycles = {config.cycles} for a run of {total_steps} steps: each cycle needs "
            "at least one step; use fewer cycles or a longer duration"
        )
    return ends


def cosine(t: int, steps: int, final: float = 0.0) -> float:
    """Half a cosine from 1 at step 0 to `final` at `steps` and after (SGDR, eq. 5)."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(t / steps, 1.0)))


def _warmed(config: c.Warmup, warmup: int, decay: LrMultiplier) -> LrMultiplier:
    """The warmup, then `decay` counted from its end."""

    def lr_multiplier(t: int) -> float:
        return _warmup(config, t, warmup) if t < warmup else decay(t - warmup)

    return lr_multiplier


def _warmup(config: c.Warmup, t: int, steps: int) -> float:
    """From `warmup_start` at step 0 to 1 at step `steps`, by equal sums or equal factors."""
    if config.warmup_shape == "exponential":
        return config.warmup_start ** (1.0 - t / steps)
    return config.warmup_start + (1.0 - config.warmup_start) * t / steps


def _cycles(config: c.Cycles, total_steps: int, steps: Callable[[Length], int]) -> LrMultiplier:
    ends = cycle_ends(config, total_steps)
    starts = [0, *ends[:-1]]
    warmups = [steps(config.warmup)] + [steps(config.rewarmup)] * (len(ends) - 1)
    for i, (start, end, warmup) in enumerate(zip(starts, ends, warmups, strict=True)):
        _check_warmup("rewarmup" if i else "warmup", warmup, f"cycle {i + 1}", end - start)

    def lr_multiplier(t: int) -> float:
        i = min(bisect_right(ends, t), len(ends) - 1)
        t, length, warmup = t - starts[i], ends[i] - starts[i], warmups[i]
        if t < warmup:
            return _warmup(config, t, warmup)
        return cosine(t - warmup, length - warmup, config.final)

    return lr_multiplier


def _linear_cosine(config: c.LinearCosine, t: int, steps: int) -> float:
    """Bello et al. 2017 (arXiv:1709.07417), appendix; TensorFlow's linear_cosine_decay."""
    t = min(t, steps)
    linear = 1.0 - t / steps
    if config.noise:
        u, v = uniforms((2,), "schedule noise", config.seed, t)
        normal = math.sqrt(-2.0 * math.log(1.0 - u)) * math.cos(2.0 * math.pi * v)
        linear += normal * math.sqrt(config.noise / (1 + t) ** config.noise_decay)
    wave = 0.5 * (1.0 + math.cos(math.pi * 2.0 * config.periods * t / steps))
    return max((config.alpha + linear) * wave + config.beta, 0.0)  # noise never turns the rate


def _polynomial(config: c.Polynomial, t: int, length: int) -> float:
    if config.cycle:
        length *= max(1, math.ceil(t / length))
    return config.final + (1.0 - config.final) * (1.0 - min(t / length, 1.0)) ** config.power


def _triangular(config: c.Triangular, t: int, rise: int) -> float:
    """Smith 2017 (arXiv:1506.01186); torch's CyclicLR in modes triangular and triangular2."""
    cycle, place = divmod(t, 2 * rise)
    height = 1.0 - abs(place / rise - 1.0)
    return config.low + (1.0 - config.low) * height * (0.5**cycle if config.halving else 1.0)


def _one_cycle(config: c.OneCycle, total_steps: int) -> LrMultiplier:
    """Torch's OneCycleLR in two phases: the peak stands at step rise x total - 1."""
    peak, last = config.rise * total_steps - 1.0, total_steps - 1.0
    if peak <= 0.0:
        raise UserError(
            f"schedule.rise = {config.rise:g} of {total_steps} steps leaves no step to rise in; "
            "raise it or train longer"
        )

    def lr_multiplier(t: int) -> float:
        if t <= peak:
            start, end, place = config.start, 1.0, t / peak
        else:
            start, end, place = 1.0, config.final, min((t - peak) / (last - peak), 1.0)
        if config.shape == "cosine":
            place = 0.5 * (1.0 - math.cos(math.pi * place))
        return start + (end - start) * place

    return lr_multiplier


def _sequence(
    config: c.Sequence,
    total_steps: int,
    steps: Callable[[Length], int],
    inner: Callable[[c.Schedule, int, int], LrMultiplier],
) -> LrMultiplier:
    starts, lr_multipliers = [0], []
    for i, piece in enumerate(config.pieces, 1):
        left = total_steps - starts[-1]
        length = left if piece.length is None else steps(piece.length)
        if length < 1 or starts[-1] + length > total_steps:
            raise UserError(
                f"schedule.pieces: piece {i} of {len(config.pieces)} takes {length} steps, but "
                f"{left} of the run's {total_steps} are left for it; fit the lengths to the run"
            )
        lr_multipliers.append(inner(piece.schedule, length, starts[-1]))
        starts.append(starts[-1] + length)

    def lr_multiplier(t: int) -> float:
        i = min(bisect_right(starts, t), len(lr_multipliers)) - 1
        return lr_multipliers[i](t - starts[i])

    return lr_multiplier


def _periods(
    config: c.Exponential | c.NaturalExponential | c.InverseTime, t: int, every: int
) -> float:
    return t // every if config.staircase else t / every


def _ascending(name: str, lengths: list[Length], steps: Callable[[Length], int]) -> list[int]:
    marks = [steps(length) for length in lengths]
    if any(a >= b for a, b in pairwise(marks)):
        raise UserError(
            f"schedule.{name} fall on steps {', '.join(map(str, marks))}; "
            "each must come after the one before"
        )
    return marks


def _check_warmup(name: str, steps: int, where: str, length: int) -> None:
    if steps >= length and steps > 0:
        raise UserError(
            f"schedule.{name} takes {steps} steps, but {where} has {length}: "
            "shorten it or train longer"
        )
