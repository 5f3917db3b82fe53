"""Which weights enter a run's average, and how fast it forgets them. Free of torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bigbatch.configs.averaging import EMA, SWA, Average
from bigbatch.configs.durations import Length
from bigbatch.configs.errors import UserError


@dataclass(frozen=True)
class Averaging:
    """The weights after each of `steps` finished steps, rising ones, enter the average.

    Those that entered k updates ago weigh exp(-k x `decay_rate`) of the newest ones: 0 makes a
    plain mean of it.
    """

    steps: Sequence[int]
    decay_rate: float


def plan_average(
    config: Average | None,
    total: int,
    global_batch: int,
    epoch_samples: int,
    cycle_ends: Sequence[int],
) -> Averaging | None:
    """What `config` comes to in a run of `total` steps. Raises UserError where it does not fit.

    The half-life is in samples, and so the decay in a step goes with the batch: of a batch k
    times as large it is that of k steps (Busbridge et al. 2023, arXiv:2307.13813).
    """
    if config is None:
        return None

    def steps(length: Length) -> int:
        return length.steps(global_batch, epoch_samples)

    start = steps(config.start)
    entering: Sequence[int]
    match config:
        case EMA():
            half_life = config.half_life.samples(global_batch, epoch_samples)
            if half_life < global_batch:
                raise UserError(
                    f"average.half_life = {config.half_life} is {half_life:.6g} samples, less than "
                    f"the {global_batch:,} of one step: the average would be little but the newest "
                    "weights; write a longer one, such as 10 steps"
                )
            entering = range(start + 1, total + 1)
            decay_rate = math.log(2) * global_batch / half_life
        case SWA(every=every):
            decay_rate = 0.0  # all weigh the same
            if isinstance(every, Length):
                stride = steps(every)
                entering = range(start or stride, total + 1, stride)
            else:
                entering = tuple(end for end in cycle_ends if end >= start)
    if len(entering) < 2:
        often = "" if isinstance(config, EMA) else ", make average.every shorter"
        raise UserError(
            f"average.start = {config.start} is step {start} of {total}: "
            f"{'one set' if entering else 'no set'} of weights would enter the average; set "
            f"average.start sooner{often}, or train longer"
        )
    return Averaging(entering, decay_rate)
