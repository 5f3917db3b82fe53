"""What the visits of each sample say of it: forgetting, margins, data maps. NumPy only."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigbatch.trainers.dynamics.rows import Rows

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

_CHUNK = 1 << 20  # positions that are looked at together
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Dynamics:
    """Of N samples, by number in the index; means are NaN where there was no visit.

    A visit counts where it was recorded, is finite, and was in a step that made an update.
    """

    visits: Numbers
    loss: Floats  # mean
    margin: Floats  # mean: the area under the margin (Pleiss et al. 2020, arXiv:2001.10528, eq. 2)
    confidence: Floats  # mean p(true) (Swayamdipta et al. 2020, arXiv:2009.10795, section 2.1)
    variability: Floats  # its standard deviation over visits (likewise)
    right: Floats  # share of visits with a margin above 0: "correctness" there
    forgotten: Numbers  # right at one visit, wrong at the next (Toneva et al. 2019, 1812.05159)
    learned: Numbers  # the first visit at which it was right, from 1; 0: never
    positions: int  # that were looked at, of which ...
    unrecorded: int  # ... have no row: not recorded, or another sample stood in its place
    not_finite: int
    no_update: int  # ... were in steps without an update: stepped over, or overflown in fp16

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        return self.visits > 0

    @property
    def unforgettable(self) -> npt.NDArray[np.bool_]:
        """Learned at some visit, and right ever after (Toneva et al. 2019, section 3)."""
        return (self.learned > 0) & (self.forgotten == 0)

    @property
    def never_learned(self) -> npt.NDArray[np.bool_]:
        return self.seen & (self.learned == 0)

    def ranking(self) -> Numbers:
        """Samples that were seen, the most probable label errors first: by their mean margin."""
        order = np.lexsort((np.arange(len(self.margin)), self.margin))
        return order[self.seen[order]]


def study(
    rows: Rows, samples: Callable[[Numbers], Numbers], count: int, chunk: int = _CHUNK
) -> Dynamics:
    """What rows [P, 3] say of `count` samples; `samples` is the order's, from position to sample.

    Goes through the rows once, `chunk` at a time, with some 80 bytes a sample.
    """
    visits, right, forgotten = (np.zeros(count, np.int64) for _ in range(3))
    learned = np.full(count, _NEVER)
    sums = np.zeros((4, count))  # loss, margin, p, p^2
    last = np.full(count, -1, np.int8)  # 1: right at the last visit, 0: wrong, -1: not seen yet
    unrecorded = not_finite = no_update = 0
    for start in range(0, len(rows), chunk):
        some = np.asarray(rows[start : start + chunk])
        there = (some.view(np.uint16) != 0).any(1)
        finite = np.isfinite(some).all(1)
        updated = ~np.signbit(some[:, 2])
        unrecorded += int(np.count_nonzero(~there))
        not_finite += int(np.count_nonzero(~finite))
        no_update += int(np.count_nonzero(finite & ~updated))
        counts = np.flatnonzero(there & finite & updated)
        if not counts.size:
            continue
        drawn = samples(start + counts)
        values = some[counts].astype(np.float64)
        for total, column in zip(sums, (*values.T, values[:, 2] ** 2), strict=True):
            total += np.bincount(drawn, column, count)
        # By sample, and of each in the order of its visits.
        by_sample = np.argsort(drawn, kind="stable")
        own, correct = drawn[by_sample], (values[:, 1] > 0)[by_sample]
        begins = np.ones(len(own), bool)
        begins[1:] = own[1:] != own[:-1]
        before = np.where(begins, last[own], np.concatenate([[-1], correct[:-1]]))
        forgotten += np.bincount(own[(before == 1) & ~correct], minlength=count)
        places = np.arange(len(own))
        turn = places - np.maximum.accumulate(np.where(begins, places, 0)) + 1 + visits[own]
        np.minimum.at(learned, own[correct], turn[correct])
        ends = np.roll(begins, -1)
        last[own[ends]] = correct[ends]
        visits += np.bincount(own, minlength=count)
        right += np.bincount(own[correct], minlength=count)
    with np.errstate(invalid="ignore", divide="ignore"):
        loss, margin, confidence, square = sums / visits
        share = right / visits
    return Dynamics(
        visits,
        loss,
        margin,
        confidence,
        np.sqrt(np.maximum(square - confidence**2, 0)),
        share,
        forgotten,
        np.where(learned == _NEVER, 0, learned),
        len(rows),
        unrecorded,
        not_finite,
        no_update,
    )


def weights(found: Dynamics, way: str, drop: float = 0.0) -> Floats:
    """A weight for each sample [N], for the sampling policy `weights`.

    errors: 0 for the first of the ranking, of which there are `drop` times N, 1 for all others.
    forgotten: 1 + how often it was forgotten, of one never learned that of the most often
    forgotten. ambiguous: its variability. A sample that was not seen has the mean weight of those
    that were; for errors 1.
    """
    seen = found.seen
    if way == "errors":
        result = np.ones(len(seen))
        result[found.ranking()[: round(drop * len(seen))]] = 0
        return result
    if way == "forgotten":
        most = found.forgotten.max(initial=0)
        result = 1.0 + np.where(found.never_learned, most, found.forgotten)
    else:
        assert way == "ambiguous"
        result = np.where(seen, found.variability, 0)
    result[~seen] = result[seen].mean() if seen.any() else 1
    return result
