"""Order for network storage: few shards at a time, and each of them on few ranks.

An epoch's line is all samples, shard after shard in a random order of shards. It is cut into
L spans of equal length, give or take one sample, the *lanes*. A lane is shuffled window by
window; a window holds the samples of a few neighbouring shards. Micro-batch m of a step
draws from lane m mod L, so a rank of W, where W divides L, stays on its own L / W lanes.

Like every order it is a stateless function of the position, so batches are the same at any
world size. Each lane goes through an endless concatenation of its spans, and together the
lanes use every sample once an epoch. The next epoch begins in some lanes at most one
sample earlier than in others, and so in the same step or at its edge.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.data.index import Index
from bigbatch.data.order import Order, Positions, Words, _Uniform, permute
from bigbatch.data.rng import key64, mix64

_STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class _Line:
    """One epoch's line: S shards, L lanes and their windows, as places in it."""

    shards: Positions  # int64 [S], in this epoch's order
    shard_starts: Positions  # int64 [S + 1], the place of each one's first sample
    lane_starts: Positions  # int64 [L + 1]
    window_starts: Positions  # int64 [windows + 1]; none reaches across two lanes
    window_keys: Words  # uint64 [windows]


class LaneOrder(Order):
    """Every sample once an epoch, drawn lane by lane.

    `lanes` must divide the number of micro-batches in a step. `window` is how many shards
    are mixed. Raises UserError where a shard would reach over more than two lanes.
    """

    def __init__(
        self, index: Index, seed: int, *, lanes: int, window: int, micro_batch: int
    ) -> None:
        counts = np.array([shard.samples for shard in index.shards], np.int64)
        if counts.max() > len(index) // lanes:
            most = len(index) // int(counts.max())
            raise UserError(
                f"data.lanes = {lanes} leaves {len(index) // lanes:,} samples to each "
                f"lane, fewer than its largest shard holds ({counts.max():,}); set data.lanes "
                f"to {most} or less, or write smaller shards"
            )
        super().__init__(
            index,
            seed,
            _Uniform(len(index)),
            f"lanes={lanes} window={window} micro_batch={micro_batch}",
        )
        self.lanes, self.window, self.micro_batch = lanes, window, micro_batch
        self._counts = counts
        self._first = np.cumsum([0, *counts])  # sample of each shard: they stand in shard order
        self._line = lru_cache(maxsize=3)(self._make_line)

    def epochs(self, positions: Positions) -> Positions:
        """The epoch of each position, int64 [n]."""
        return self._places(positions)[0]

    def samples(self, positions: Positions) -> Positions:
        """The sample at each position, int64 [n]."""
        epochs, lanes, places = self._places(positions)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            line = self._line(epoch)
            place = line.lane_starts[lanes[inside]] + places[inside]
            window = np.searchsorted(line.window_starts, place, side="right") - 1
            start = line.window_starts[window]
            size = line.window_starts[window + 1] - start
            shuffled = permute(
                (place - start).view(np.uint64), size.view(np.uint64), line.window_keys[window]
            )
            place = start + shuffled.view(np.int64)
            turn = np.searchsorted(line.shard_starts, place, side="right") - 1
            samples[inside] = self._first[line.shards[turn]] + place - line.shard_starts[turn]
        return samples

    def lane(self, position: int) -> int:
        """The lane that holds a position."""
        return position // self.micro_batch % self.lanes

    def upcoming(self, position: int) -> list[int]:
        """Shards that the lane at `position` reads now and next: two windows, in that order."""
        epochs, lanes, places = self._places(np.array([position], np.int64))
        epoch, lane = int(epochs[0]), int(lanes[0])
        line = self._line(epoch)
        place = int(line.lane_starts[lane] + places[0])
        window = int(np.searchsorted(line.window_starts, place, side="right")) - 1
        shards = self._shards(line, window)
        if line.window_starts[window + 1] < line.lane_starts[lane + 1]:
            return shards + self._shards(line, window + 1)
        line = self._line(epoch + 1)
        first = int(np.searchsorted(line.window_starts, line.lane_starts[lane]))
        return shards + self._shards(line, first)

    def _shards(self, line: _Line, window: int) -> list[int]:
        start, end = line.window_starts[window : window + 2]
        first = int(np.searchsorted(line.shard_starts, start, side="right")) - 1
        last = int(np.searchsorted(line.shard_starts, end, side="left"))
        return [s for s in line.shards[first:last].tolist() if self._counts[s]]

    def _places(self, positions: Positions) -> tuple[Positions, Positions, Positions]:
        """Epoch, lane, and place in the lane's span, each int64 [n].

        The first e spans of lane l hold floor((e N + l) / L) samples together. So the spans
        of an epoch hold N (Hermite's identity), no lane is ever more than one sample ahead,
        and the epoch of a lane's j-th sample has a closed form.
        """
        batches, offsets = np.divmod(np.asarray(positions, np.int64), self.micro_batch)
        turns, lanes = np.divmod(batches, self.lanes)
        drawn = turns * self.micro_batch + offsets
        total = self.epoch_samples
        epochs = ((drawn + 1) * self.lanes - 1 - lanes) // total
        return epochs, lanes, drawn - (epochs * total + lanes) // self.lanes

    def _make_line(self, epoch: int) -> _Line:
        count, lanes = len(self._counts), np.arange(self.lanes)
        keys = key64(self.seed, epoch, "shards"), key64(self.seed, epoch, "windows")
        numbers = np.arange(count, dtype=np.uint64)
        order = permute(numbers, np.uint64(count), np.uint64(keys[0])).view(np.int64)
        shard_starts = np.cumsum([0, *self._counts[order]])
        before, after = ((e * self.epoch_samples + lanes) // self.lanes for e in (epoch, epoch + 1))
        lane_starts = np.cumsum([0, *(after - before)])
        # Pieces lie between any two cuts, be they of shards or of lanes.
        pieces = np.unique(np.concatenate([shard_starts[:-1], lane_starts[:-1]]))
        pieces = pieces[pieces < self.epoch_samples]  # empty shards may stand at the end
        lane = np.searchsorted(lane_starts, pieces, side="right") - 1
        number = np.arange(len(pieces)) - np.searchsorted(lane, lane)
        held = np.bincount(lane, minlength=self.lanes)[lane]
        # As few windows as hold the lane's pieces, and as equal: a last one with one piece
        # would hardly be mixed.
        windows = -(-held // self.window)
        slot = number * windows // held
        first = np.flatnonzero(np.diff(slot, prepend=-1) | np.diff(lane, prepend=-1))
        names = np.arange(len(first), dtype=np.uint64)
        with np.errstate(over="ignore"):
            window_keys: npt.NDArray[np.uint64] = mix64(names * _STEP + np.uint64(keys[1]))
        return _Line(
            shards=order,
            shard_starts=shard_starts,
            lane_starts=lane_starts,
            window_starts=np.append(pieces[first], self.epoch_samples),
            window_keys=window_keys,
        )
