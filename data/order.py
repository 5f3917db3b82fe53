"""The order of samples: a stateless function from position to sample.

Training runs over the endless concatenation of epochs; a position is a place in it. No
generator is advanced and nothing is stored, so any rank can ask for any position at any
time, and a resumed run asks for what would have come next.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigbatch.configs.sampling import Sampling
from bigbatch.data.index import Index
from bigbatch.data.rng import key64, mix64

Positions = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
_ROUNDS = 8
_ROUND_STEP = np.uint64(0x9E3779B97F4A7C15)


def permute(values: Words, size: Words, key: Words) -> Words:
    """A keyed permutation of range(size) at `values`, uint64 [n].

    `size` and `key` are one number each (0-d arrays) or one for each value. An alternating
    Feistel network over just enough bits, walked until it lands inside the range (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    bits = _bit_length(size - np.uint64(1))
    high, low = (bits + np.uint64(1)) >> np.uint64(1), bits >> np.uint64(1)
    result = _feistel(values, high, low, key)
    walking = np.flatnonzero(result >= size)
    while walking.size:
        n, h, w, k = (a if a.ndim == 0 else a[walking] for a in (size, high, low, key))
        x = _feistel(result[walking], h, w, k)
        result[walking] = x
        walking = walking[x >= n]
    return result


def _feistel(x: Words, high: Words, low: Words, key: Words) -> Words:
    """A bijection of numbers of high + low bits; the halves swap their widths each round."""
    one = np.uint64(1)
    widths = high, low
    with np.errstate(over="ignore"):
        left, right = x >> low, x & ((one << low) - one)
        for number in range(_ROUNDS):
            width = widths[number % 2]  # of the left half
            word = mix64((right + np.uint64(number) * _ROUND_STEP) ^ key)
            left, right = right, left ^ (word & ((one << width) - one))
    # After an even number of rounds each half has its own width again.
    return (left << low) | right


def _word(value: int) -> Words:
    return np.asarray(value, np.uint64)


def _bit_length(x: Words) -> Words:
    """Bits needed to write x; exact for all 64-bit integers below 2^53."""
    return np.asarray(np.frexp(x.astype(np.float64))[1], np.uint64)


def largest_remainder(weights: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Integers proportional to `weights` that sum to `total` exactly (Hamilton's method).

    The lower class number wins a tie.
    """
    exact = weights / weights.sum() * total
    quotas = np.floor(exact).astype(np.int64)
    rest = total - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:rest]] += 1
    return quotas


def class_quotas(sampling: Sampling, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """How often an epoch draws each class, int64 [C]; None where each sample comes once."""
    if sampling.name == "uniform":
        return None
    return largest_remainder((counts > 0).astype(np.float64), int(counts.sum()))


@dataclass(frozen=True, eq=False)
class Order:
    """The endless concatenation of epochs of `epoch_samples` positions each."""

    index: Index
    seed: int
    quotas: npt.NDArray[np.int64] | None  # by class, of every epoch; None: all samples once
    hash: str  # of everything that the order depends on

    @property
    def epoch_samples(self) -> int:
        return len(self.index) if self.quotas is None else int(self.quotas.sum())

    def epochs(self, positions: Positions) -> Positions:
        """The epoch of each position, int64 [n]."""
        return positions // self.epoch_samples

    def samples(self, positions: Positions) -> Positions:
        """The sample at each position, int64 [n]."""
        size = self.epoch_samples
        epochs, places = np.divmod(np.asarray(positions, np.int64), size)
        shuffled = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            key = _word(key64(self.seed, int(epoch), "epoch"))
            drawn = permute(places[inside].astype(np.uint64), _word(size), key)
            shuffled[inside] = drawn.astype(np.int64)
        return shuffled if self.quotas is None else self._in_classes(epochs, shuffled)

    def _in_classes(self, epochs: Positions, places: Positions) -> Positions:
        """From a place in the line of quotas to a class, and to a sample of that class.

        A class's draws are counted over all epochs and walk through its own permutations,
        a new one each time it is through: so its samples are used equally often.
        """
        assert self.quotas is not None
        ends = np.cumsum(self.quotas)
        label = np.searchsorted(ends, places, side="right")
        draw = epochs * self.quotas[label] + places - (ends - self.quotas)[label]
        count = self.index.class_counts[label]
        round_, place = np.divmod(draw, count)
        with np.errstate(over="ignore"):
            word = label.astype(np.uint64) * _ROUND_STEP + np.uint64(key64(self.seed, "class"))
            key = mix64(mix64(word) + round_.astype(np.uint64))
        inside = permute(place.astype(np.uint64), count.astype(np.uint64), key).astype(np.int64)
        return self.index.class_members[self.index.class_starts[label] + inside].astype(np.int64)

    def substitute(self, sample: int, position: int, attempt: int) -> int:
        """Another sample of the same class, for a bad one at `position`; attempts differ.

        Falls back to any other sample where the class has no second one.
        """
        index, label = self.index, int(self.index.label[sample])
        start, end = index.class_starts[label : label + 2]
        members: npt.NDArray[np.integer] = index.class_members[start:end]
        if len(members) == 1:
            members = np.arange(len(index))
        # Steps from the bad one in a keyed order of the others, none of them twice.
        others = max(len(members) - 1, 1)
        place = np.array([attempt % others], np.uint64)
        key = _word(key64(self.seed, position, "substitute"))
        step = 1 + int(permute(place, _word(others), key)[0])
        return int(members[(int(np.searchsorted(members, sample)) + step) % len(members)])


def build_order(sampling: Sampling, index: Index, seed: int) -> Order:
    """The order of a policy over an index."""
    text = f"{sampling.model_dump_json()} {index.hash} {seed}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Order(index, seed, class_quotas(sampling, index.class_counts), digest)
