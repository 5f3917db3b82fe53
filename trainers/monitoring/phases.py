"""Where a step's time goes, on each rank, and which rank holds the others up.

On a CPU phases are timed by the host's clock. On a GPU they are bracketed by CUDA events,
which are read once the device has passed them, a step or two later: nothing waits for them.
Ranks tell each other in the step's own all-reduce, so that timing adds no collective.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# In the order of a step. `data`: the host waits for the loader. `model`: forward, loss and
# backward. `reduce`: the exchange between ranks as far as the backward pass does not hide
# it, and so also the time for which a rank waits for slower ones.
PHASES = ("data", "copy", "augment", "model", "reduce", "optimizer")
_WORK = tuple(PHASES.index(name) for name in PHASES if name != "reduce")
_ONCE = [PHASES[i] == "optimizer" for i in _WORK]  # in a step; the others in each micro-batch
# Columns of the table behind the phases: steps, micro-batches, shard + 1, seconds in it.
_STEPS, _MICRO, _SHARD, _SHARD_S = range(len(PHASES), len(PHASES) + 4)
_COLUMNS = len(PHASES) + 4
_MEMORY = 0.9  # weight of the past tables: about ten of them
_NOTICEABLE = 0.05  # of a step: less than this is no straggler


class Clock:
    """Times the phases of this rank's steps. Use: `with clock("model"): ...`."""

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.waited = 0.0  # seconds in `data` in the running step
        self._cuda = device.type == "cuda"
        self._device = device
        self._rank, self._world = rank, world
        self._open: tuple[int, Any] | None = None
        self._step: list[tuple[int, Any, Any]] = []  # phase, begin, end
        self._past: deque[list[tuple[int, Any, Any]]] = deque()  # steps not read yet
        self._spare: list[Any] = []  # events to use again
        self._row = np.zeros(_COLUMNS)
        self._reads: dict[int, float] = {}  # seconds of reading by shard
        self._micro = 0

    def begin_step(self) -> None:
        if self._step:
            self._past.append(self._step)
            self._row[_MICRO] += self._micro
        self._step, self.waited, self._micro = [], 0.0, 0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._begin(PHASES.index(phase))
        try:
            yield
        finally:
            self._end()

    def sent(self) -> None:
        """Count what is left of a `model` phase as `reduce`: gradients are on their way.

        Any thread may call this. In another phase, as when L-BFGS evaluates the loss again,
        it changes nothing.
        """
        if self._open is not None and self._open[0] == PHASES.index("model"):
            self._end()
            self._begin(PHASES.index("reduce"))

    def micro_batch(self, slow_read: tuple[int, float] | None) -> None:
        """Count a micro-batch, with the shard that its reader spent most time in."""
        self._micro += 1
        if slow_read is not None:
            shard, seconds = slow_read
            self._reads[shard] = self._reads.get(shard, 0.0) + seconds

    def _begin(self, phase: int) -> None:
        self._open = (phase, self._now(phase))

    def _end(self) -> None:
        assert self._open is not None, "no phase is open"
        phase, begin = self._open
        end = self._now(phase)
        if phase == 0:
            self.waited += end - begin
        self._step.append((phase, begin, end))
        self._open = None

    def _now(self, phase: int) -> Any:
        if not self._cuda or phase == 0:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def table(self) -> Tensor:
        """What all ranks measured since the last table, once summed over ranks.

        float64 [world * columns] on the device, zero but for this rank's own row. Steps that
        the device has not passed yet wait for the next table.
        """
        table = np.zeros((self._world, _COLUMNS))
        while self._past and self._passed(self._past[0]):
            for phase, begin, end in self._past.popleft():
                self._row[phase] += self._seconds(phase, begin, end)
            self._row[_STEPS] += 1
        if self._reads:
            shard = max(self._reads, key=self._reads.__getitem__)
            self._row[_SHARD], self._row[_SHARD_S] = shard + 1, self._reads[shard]
        table[self._rank] = self._row
        self._row = np.zeros(_COLUMNS)
        self._reads = {}
        return torch.from_numpy(table.ravel()).to(self._device, non_blocking=True)

    def nothing(self) -> Tensor:
        """An empty table, for steps that leave no record."""
        return torch.zeros(0, dtype=torch.float64, device=self._device)

    def _passed(self, step: Sequence[tuple[int, Any, Any]]) -> bool:
        return not self._cuda or all(end.query() for phase, _, end in step if phase)

    def _seconds(self, phase: int, begin: Any, end: Any) -> float:
        if not self._cuda or phase == 0:
            return float(end - begin)
        self._spare += [begin, end]
        return float(begin.elapsed_time(end)) / 1000


@dataclass(frozen=True)
class Slowest:
    """The rank that the others wait for."""

    rank: int
    phase: str  # in which it differs most from the median rank
    share: float  # of a step, by which it is slower there than the median rank
    shard: int | None  # number of the shard that its reader spent most time in


class Timings:
    """What the ranks' tables say: the last one, and the sum of the last ten or so."""

    def __init__(self, world: int) -> None:
        self._last = np.zeros((world, _COLUMNS))
        self._sums = np.zeros((world, _COLUMNS))

    def add(self, values: Sequence[float]) -> None:
        """Take a table that was summed over ranks."""
        new = self._last = np.array(values).reshape(self._sums.shape)
        self._sums *= _MEMORY
        slower = new[:, _SHARD_S] > self._sums[:, _SHARD_S]
        shards = np.where(slower[:, None], new[:, _SHARD:], self._sums[:, _SHARD:])
        # The number of a shard is no sum, and does not fade.
        shards[:, 0] = np.where(slower, new[:, _SHARD], self._sums[:, _SHARD] / _MEMORY)
        self._sums += new
        self._sums[:, _SHARD:] = shards

    @property
    def seconds(self) -> npt.NDArray[np.float64] | None:
        """Seconds of a step in each phase, lately, [ranks, phases]; None: not known yet."""
        return _per_step(self._sums)

    def mean(self) -> dict[str, float]:
        """Seconds of a step in each phase, the ranks' mean, in the last table; {}: not known."""
        seconds = _per_step(self._last)
        return {} if seconds is None else dict(zip(PHASES, seconds.mean(0).tolist(), strict=True))

    def slowest(self) -> Slowest | None:
        """The straggler; None where no rank is slower than the median by 5 % of a step.

        Ranks are compared by their own work: who is fast waits in `reduce`. Per micro-batch,
        because where the ranks do not divide a step evenly, some have one more to do; and where
        the batch changes, a rank may have had none lately, and is compared with nobody.
        """
        seconds = self.seconds
        if seconds is None or len(seconds) == 1:
            return None
        micro = self._sums[:, _MICRO] / self._sums[:, _STEPS]
        times = np.where(_ONCE, 1.0, micro[:, None])
        work = np.full_like(times, np.nan)
        np.divide(seconds[:, _WORK], times, out=work, where=micro[:, None] > 0)
        # Of two ranks the faster one is what the slower one is held against.
        middle = np.nanquantile(work, 0.5, axis=0, method="lower")
        excess = np.nan_to_num((work - middle) * times)
        rank = int(excess.sum(1).argmax())
        phase = int(excess[rank].argmax())
        share = float(excess[rank, phase] / seconds[rank].sum())
        if share < _NOTICEABLE:
            return None
        shard = int(self._sums[rank, _SHARD]) - 1
        name = PHASES[_WORK[phase]]
        return Slowest(rank, name, share, shard if name == "data" and shard >= 0 else None)


def _per_step(table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    steps = table[:, _STEPS]
    return table[:, : len(PHASES)] / steps[:, None] if steps.all() else None
