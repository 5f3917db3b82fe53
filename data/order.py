"""The order of samples: a stateless function from position to sample.

Training runs over the endless concatenation of epochs; a position is a place in it. No
generator is advanced and nothing is stored, so any rank can ask for any position at any
time, and a resumed run asks for what would have come next.

An epoch is a line of places in a keyed random order. What stands at a place is the policy's
matter: the sample with that number; or a class, for which there are exact integer quotas,
and the next sample of that class; or the sample whose share of the line it falls into.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from bigbatch.configs.errors import UserError
from bigbatch.configs.sampling import Sampling
from bigbatch.data.index import Index
from bigbatch.data.rng import key64, mix64

Positions = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
_ROUNDS = 8
_ROUND_STEP = np.uint64(0x9E3779B97F4A7C15)


class Order:
    """The endless concatenation of epochs of `epoch_samples` positions each.

    `hash` identifies everything that the order depends on: policy, index and seed.
    """

    def __init__(self, index: Index, seed: int, policy: "_Policy", identity: str) -> None:
        self.index = index
        self.seed = seed
        self.epoch_samples = policy.epoch_samples
        self.hash = hashlib.sha256(f"{identity} {index.hash} {seed}".encode()).hexdigest()[:16]
        self._policy = policy

    def epochs(self, positions: Positions) -> Positions:
        """The epoch of each position, int64 [n]."""
        return positions // self.epoch_samples

    def samples(self, positions: Positions) -> Positions:
        """The sample at each position, int64 [n]."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.epoch_samples)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            key = np.uint64(key64(self.seed, epoch, "epoch"))
            shuffled = permute(places[inside].view(np.uint64), np.uint64(self.epoch_samples), key)
            samples[inside] = self._policy.draw(epoch, shuffled.view(np.int64))
        return samples

    def substitute(self, sample: int, position: int, attempt: int) -> int:
        """Another sample of the same class, for a bad one at `position`; attempts differ.

        Falls back to any other sample where the class has no second one.
        """
        index, label = self.index, int(self.index.label[sample])
        start, end = index.class_starts[label : label + 2].tolist()
        alone = end - start == 1
        members = None if alone else index.class_members[start:end]
        count = len(index) if members is None else len(members)
        own = sample if members is None else int(np.searchsorted(members, sample))
        # Steps from the bad one in a keyed order of the others, none of them twice.
        others = np.uint64(max(count - 1, 1))
        key = np.uint64(key64(self.seed, position, "substitute"))
        place = np.array([attempt], np.uint64) % others
        other = (own + 1 + int(permute(place, others, key)[0])) % count
        return other if members is None else int(members[other])


class _Policy(Protocol):
    """What stands at each place of an epoch."""

    epoch_samples: int

    def draw(self, epoch: int, places: Positions) -> Positions: ...


class _Uniform:
    def __init__(self, samples: int) -> None:
        self.epoch_samples = samples

    def draw(self, epoch: int, places: Positions) -> Positions:
        return places


class _Classes:
    """Exact quotas by class.

    The draws of a class are counted on over the epochs and go round in an order of its own,
    so any stretch of them uses each of its samples equally often, give or take one.
    """

    def __init__(self, sampling: Sampling, index: Index, seed: int) -> None:
        self.sampling = sampling
        self.index = index
        self.counts = index.class_counts
        self.epoch_samples = int(class_quotas(sampling, self.counts, 0).sum())
        with np.errstate(over="ignore"):
            numbers = np.arange(len(self.counts), dtype=np.uint64) * _ROUND_STEP
            self._keys = mix64(numbers + np.uint64(key64(seed, "class")))
        self._known = 0, np.zeros_like(self.counts)  # an epoch, and the draws before it
        self._line = lru_cache(maxsize=2)(self._make_line)

    def draw(self, epoch: int, places: Positions) -> Positions:
        ends, first = self._line(epoch)
        label = np.searchsorted(ends, places, side="right")
        count = self.counts[label]
        turn = (first[label] + places) % count
        member = permute(turn.view(np.uint64), count.view(np.uint64), self._keys[label])
        starts = self.index.class_starts[label]
        return self.index.class_members[starts + member.view(np.int64)].astype(np.int64)

    def _make_line(self, epoch: int) -> tuple[Positions, Positions]:
        """By class: where it ends in the line of quotas, and which of its draws place 0 is."""
        quotas = class_quotas(self.sampling, self.counts, epoch)
        ends = np.cumsum(quotas)
        return ends, self._draws_before(epoch, quotas) - (ends - quotas)

    def _draws_before(self, epoch: int, quotas: Positions) -> Positions:
        """How often each class was drawn before an epoch, int64 [C]."""
        sampling = self.sampling
        if sampling.name == "easy_ensemble":
            return sampling.member * quotas
        if sampling.name != "progressive":
            return epoch * quotas
        flat = sampling.epochs - 1  # from here on, quotas stay the same
        start, draws = self._known if self._known[0] <= epoch else (0, np.zeros_like(quotas))
        for earlier in range(start, min(epoch, flat)):
            draws = draws + class_quotas(sampling, self.counts, earlier)
        self._known = min(epoch, flat), draws
        return draws + max(0, epoch - flat) * quotas


class _Weighted:
    """Systematic sampling: the line is divided among the samples by weight.

    A sample with weight w, relative to the mean, is drawn floor(w) or ceil(w) times an epoch.
    The line shifts from epoch to epoch by the golden ratio, which spreads the remainders as
    evenly as any constant can (Kronecker sequence).
    """

    _UNIT = 1 << 20  # of the line, for each place
    _SHIFT = round(_UNIT * (5**0.5 - 1) / 2)

    def __init__(self, weights: npt.NDArray[np.float64], seed: int) -> None:
        self.epoch_samples = len(weights)
        line = np.cumsum(weights)
        # Each sample ends where its share does; the last one at the very end.
        self.ends = np.rint(line * (len(weights) * self._UNIT / line[-1])).astype(np.int64)
        self._start = key64(seed, "weights") % self._UNIT

    def draw(self, epoch: int, places: Positions) -> Positions:
        point = places * self._UNIT + (self._start + epoch * self._SHIFT) % self._UNIT
        return np.searchsorted(self.ends, point, side="right").astype(np.int64)


def build_order(sampling: Sampling, index: Index, seed: int) -> Order:
    """The order of a policy over an index. Raises UserError for weights that do not fit it."""
    if sampling.name == "weights":
        weighted = _Weighted(read_weights(Path(sampling.file), index), seed)
        # What the file says, wherever it lies.
        return Order(index, seed, weighted, hashlib.sha256(weighted.ends.tobytes()).hexdigest())
    policy = _Uniform(len(index)) if sampling.name == "uniform" else _Classes(sampling, index, seed)
    return Order(index, seed, policy, sampling.model_dump_json())


def class_quotas(sampling: Sampling, counts: Positions, epoch: int) -> Positions:
    """How often an epoch draws each class, int64 [C], from its number of samples."""
    total = int(counts.sum())
    present = counts > 0
    share = counts / total
    if sampling.name == "balanced":
        return largest_remainder(present.astype(float), total)
    if sampling.name == "tempered":
        return largest_remainder(np.where(present, counts**sampling.alpha, 0), total)
    if sampling.name == "progressive":
        done = min(epoch / (sampling.epochs - 1), 1)
        return largest_remainder((1 - done) * share + done * present / present.sum(), total)
    if sampling.name == "label_shuffling":
        return present * counts.max()
    if sampling.name == "repeat_factor":
        factor = np.sqrt(sampling.threshold / np.where(present, share, 1)).clip(1)
        return np.rint(counts * factor).astype(np.int64)
    assert sampling.name == "easy_ensemble"
    return np.minimum(counts, round(sampling.ratio * counts[present].min()))


def largest_remainder(weights: npt.NDArray[np.float64], total: int) -> Positions:
    """Integers proportional to `weights` that sum to `total` exactly (Hamilton's method).

    The lower number wins a tie.
    """
    exact = weights * (total / weights.sum())
    quotas = np.floor(exact).astype(np.int64)
    rest = total - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:rest]] += 1
    return quotas


def read_weights(path: Path, index: Index) -> npt.NDArray[np.float64]:
    """The weight of each sample, from columns `key` and `weight`: float64 [N].

    Rows with other keys are passed over. Raises UserError for a sample without a weight, and
    for a weight that is negative or not finite.
    """
    try:
        if path.suffix == ".csv":
            types = {"key": pa.string(), "weight": pa.float64()}
            table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=types))
        else:
            table = pq.read_table(path, columns=["key", "weight"])
        keys, column = table["key"].cast(pa.string()), table["weight"].cast(pa.float64())
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read weights from {path} ({error}); give a Parquet or CSV file with the "
            "columns `key` and `weight`"
        ) from None
    rows = pc.index_in(pa.array(index.keys()), value_set=keys)
    if rows.null_count:
        first = index.keys()[rows.is_null().to_pylist().index(True)]
        raise UserError(
            f"{path} has no weight for {rows.null_count:,} of {len(index):,} samples, such as "
            f"{first!r}; give every key of {index.root / 'index' / 'keys.parquet'} one"
        )
    weights = column.take(rows).to_numpy().astype(np.float64)
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any() or not weights.any():
        value = weights[wrong][0] if wrong.any() else 0
        raise UserError(
            f"{path} holds the weight {value}; weights must be finite, not negative, and not all 0"
        )
    return weights


def permute(values: Words, size: Words | np.uint64, key: Words | np.uint64) -> Words:
    """A keyed permutation of range(size) at `values`; size and key may differ by element.

    An alternating Feistel network over just enough bits, walked until it lands inside the
    range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    bits = _bit_length(np.asarray(size, np.uint64) - np.uint64(1))
    parts: tuple[Any, ...] = (
        size,
        (bits + np.uint64(1)) >> np.uint64(1),
        bits >> np.uint64(1),
        key,
    )
    result = _feistel(values, *parts[1:])
    walking = np.flatnonzero(result >= size)
    while walking.size:
        # Scalars stay scalars: with one size and one key the whole walk broadcasts.
        own_size, *own = (p if np.ndim(p) == 0 else p[walking] for p in parts)
        x = _feistel(result[walking], *own)
        result[walking] = x
        walking = walking[x >= own_size]
    return result


def _feistel(
    x: Words, high: Words | np.uint64, low: Words | np.uint64, key: Words | np.uint64
) -> Words:
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


def _bit_length(x: Words) -> Words:
    """Bits needed to write x; exact for all 64-bit integers below 2^53."""
    return np.frexp(x.astype(np.float64))[1].astype(np.uint64)
