"""Which weights enter a run's average, and how fast it forgets them. Free of torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bigbatch.configs.averaging import EMA, SWA, Average
from bigbatch.configs.durations import Length
from bigbatch.configs.errors import UserError
from bigbatch.configs.timeline import Timeline


@dataclass(frozen=True)
class Averaging:
    """The weights after each of `steps` finished steps, rising ones, enter the average.

    Those that entered k updates ago weigh exp(-k x `decay_rate`) of the newest ones: 0 makes a
    plain mean of it.
    """

    steps: Sequence[int]
    decay_rate: float
    timeline: Timeline | None = None  # where an update counts for as many as its units are

    def updates(self, step: int) -> int:
        """For how many updates those after `step` finished steps count."""
        return 1 if self.timeline is None else self.timeline.batch(step - 1) // self.timeline.unit


def plan_average(
    config: Average | None,
    total: int,
    line: Timeline,
    cycle_ends: Sequence[int],
) -> Averaging | None:
    """What `config` comes to in a run of `total` steps. Raises UserError where it does not fit.

    The half-life is in samples, and so the decay in a step goes with the batch: of a batch k
    times as large it is that of k steps (Busbridge et al. 2023, arXiv:2307.13813). One in steps
    is the same number of steps whatever they hold, where the batch changes.
    """
    if config is None:
        return None
    start = line.steps(config.start)
    by_samples: Timeline | None = None
    entering: Sequence[int]
    match config:
        case EMA():
            unit, largest = line.unit, line.largest
            if line.changes and config.half_life.unit == "steps":
                largest = unit  # as in the samples of a step that never changes
            elif line.changes:
                by_samples = line
            half_life = config.half_life.samples(unit, line.epoch_samples)
            if half_life < largest:
                raise UserError(
                    f"average.half_life = {config.half_life} is {half_life:.6g} samples, less than "
                    f"the {largest:,} of one step: the average would be little but the newest "
                    "weights; write a longer one, such as 10 steps"
                )
            entering = range(start + 1, total + 1)
            decay_rate = math.log(2) * unit / half_life
        case SWA(every=every):
            decay_rate = 0.0  # all weigh the same
            if isinstance(every, Length):
                stride = line.every(every)
                if isinstance(stride, int):
                    entering = range(start or stride, total + 1, stride)
                else:
                    after = replace(stride, start=line.units(start)).steps(total)
                    entering = (start, *after) if start else after
            else:
                entering = tuple(end for end in cycle_ends if end >= start)
    if len(entering) < 2:
        often = "" if isinstance(config, EMA) else ", make average.every shorter"
        raise UserError(
            f"average.start = {config.start} is step {start} of {total}: "
            f"{'one set' if entering else 'no set'} of weights would enter the average; set "
            f"average.start sooner{often}, or train longer"
        )
    return Averaging(entering, decay_rate, by_samples)
