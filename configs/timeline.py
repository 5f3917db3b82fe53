"""Which samples each step takes: a pure function of the step, also where the batch changes."""

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from bigbatch.configs.durations import Length

_ROUNDING = 1e-9  # of a step: 0.1 epochs of 1000 samples are 100, not 100.00000000000001


@dataclass(frozen=True)
class Timeline:
    """Step s takes the samples at positions first(s) to first(s + 1).

    The run is cut into stretches of one batch each; of a constant batch there is one. Where the
    batch changes, lengths are counted in `unit` samples, of which every batch is a multiple, as
    they are counted in steps elsewhere: of a constant batch a unit is a step.
    """

    starts: tuple[int, ...]  # the first step of each stretch, rising from 0
    positions: tuple[int, ...]  # the first sample of that step
    batches: tuple[int, ...]  # samples in a step
    epoch_samples: int
    # Of a batch that is decided on while training: all that it can be. What is not decided yet
    # stays as it is: the run is no longer than that.
    sizes: tuple[int, ...] = ()

    @classmethod
    def constant(cls, batch: int, epoch_samples: int) -> Self:
        return cls((0,), (0,), (batch,), epoch_samples)

    @classmethod
    def changing(
        cls,
        first: int,
        changes: Iterable[tuple[float, int]],
        epoch_samples: int,
        sizes: tuple[int, ...] = (),
    ) -> Self:
        """Steps of `first` samples, and of `batch` ones from `samples` on, for each of `changes`.

        A step that begins at or behind that position is the first of its batch. A change that
        another one overtakes before any step begins leaves no stretch.
        """
        starts, positions, batches = [0], [0], [first]
        for samples, batch in changes:
            steps = max(0, math.ceil((samples - positions[-1]) / batches[-1] - _ROUNDING))
            if steps == 0:
                batches[-1] = batch
                continue
            starts.append(starts[-1] + steps)
            positions.append(positions[-1] + steps * batches[-1])
            batches.append(batch)
        return cls(tuple(starts), tuple(positions), tuple(batches), epoch_samples, sizes)

    @property
    def changes(self) -> bool:
        """Whether the batch is not the same throughout, or may yet change."""
        return len(self.batches) > 1 or self.is_open

    @property
    def is_open(self) -> bool:
        """Whether batches are decided on while training."""
        return bool(self.sizes)

    @property
    def largest(self) -> int:
        """The most samples that a step has, or may have."""
        return max(*self.batches, *self.sizes, 0)

    @cached_property
    def unit(self) -> int:
        """The largest number of samples of which every batch is a multiple."""
        return math.gcd(*self.batches, *self.sizes)

    def batch(self, step: int) -> int:
        """The samples of the step after `step` finished ones."""
        return self.batches[bisect_right(self.starts, step) - 1]

    def shrinks(self, step: int) -> bool:
        """Whether the step after `step` finished ones holds fewer samples than the one before."""
        return step > 0 and self.batch(step) < self.batch(step - 1)

    def first(self, step: int) -> int:
        """The samples of `step` finished steps: also the position that the next begins at."""
        i = bisect_right(self.starts, step) - 1
        return self.positions[i] + (step - self.starts[i]) * self.batches[i]

    def units(self, step: int) -> int:
        """The same in units."""
        return self.first(step) // self.unit

    def reaching(self, samples: float) -> int:
        """The fewest steps that have taken so many samples."""
        i = max(0, bisect_right(self.positions, samples) - 1)
        over = (samples - self.positions[i]) / self.batches[i]
        return self.starts[i] + max(0, math.ceil(over - _ROUNDING))

    def within(self, units: int) -> int:
        """The most steps that take no more than so many units."""
        steps = self.reaching(units * self.unit)
        return steps if self.units(steps) <= units else steps - 1

    def steps(self, length: Length) -> int:
        """Whole steps from the run's start that cover a length; 0 for no length at all."""
        if not self.changes:
            return length.steps(self.batches[0], self.epoch_samples)
        if length.unit == "steps":
            steps = math.ceil(length.value - _ROUNDING)
        else:
            steps = self.reaching(length.samples(self.unit, self.epoch_samples))
        return max(steps, int(length.value > 0))

    def every(self, length: Length) -> "int | Crossings":
        """What repeats in this period: every so many steps, or at each multiple of samples."""
        if not self.changes or length.unit == "steps":
            return self.steps(length)
        return Crossings(self, length.steps(self.unit, self.epoch_samples))

    def upto(self, step: int) -> "Timeline":
        """The same for the first `step` steps, and from there on with the batch of the last."""
        count = max(1, bisect_right(self.starts, step - 1))
        parts = self.starts[:count], self.positions[:count], self.batches[:count]
        return Timeline(*parts, self.epoch_samples)

    @property
    def stretches(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First steps and batches: equal where two take the same samples in each step."""
        return self.starts, self.batches


@dataclass(frozen=True)
class Crossings:
    """Finished steps that reach or pass a multiple of `period` units of a timeline."""

    timeline: Timeline
    period: int
    start: int = 0  # units from which multiples count

    def due(self, step: int) -> bool:
        before, after = (self.timeline.units(s) - self.start for s in (step - 1, step))
        return after > 0 and after // self.period > max(before, 0) // self.period

    def steps(self, total: int) -> tuple[int, ...]:
        """All of them up to `total`, rising."""
        whole = (self.timeline.units(total) - self.start) // self.period
        unit = self.timeline.unit
        marks = ((self.start + k * self.period) * unit for k in range(1, whole + 1))
        return tuple(dict.fromkeys(map(self.timeline.reaching, marks)))


def due(every: int | Crossings, step: int) -> bool:
    """Whether what repeats so is due after `step` finished steps."""
    return step % every == 0 if isinstance(every, int) else every.due(step)
