"""What a ledger's digests are: sums of words times keyed odd numbers, modulo 2^64. Free of torch.

A tensor's bits are read as words of at most 32 bits, signed; elements of 8 bytes are two words, the
lower half first. Word w at place j of row r of the tensor called NAME adds

    w * (COLUMN[j] * ROW[r] * KEY[NAME])     modulo 2^64

with odd multipliers that look random (SplitMix64). A row is what one index of the first dimension
holds, in C order, whatever the memory format; a vector or scalar is one row. So a digest needs no
order of summation, and pieces of a tensor, cut anywhere, add up to the whole's.

One word that changes always changes the digest: it moves by less than 2^32 either way, times an odd
number. Changes of several words cancel with a chance of at most about 2^-32 (multilinear hashing:
Carter and Wegman 1979; Lemire and Kaser 2012, arXiv:1202.4961), two swapped words and the same bit
flipped in two words included. It guards against errors and not against forgery: the multipliers
are public. Words that are 0 add nothing, so a gradient of zeros counts as none.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from bigbatch.data.rng import key64, mix64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORDS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int32}
_BLOCK = 1 << 20  # words at once
MASK = (1 << 64) - 1

Multipliers = npt.NDArray[np.uint64]


@lru_cache(maxsize=64)
def multipliers(kind: str, count: int) -> Multipliers:
    """The first `count` multipliers of columns or of rows: odd, uint64 [count], read-only."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        found = mix64(counter + np.uint64(key64("ledger", kind))) | np.uint64(1)
    found.flags.writeable = False
    return found


def name_key(name: str) -> int:
    """The odd multiplier of a tensor's name."""
    return key64("ledger", "name", name) | 1


def words_per_element(itemsize: int) -> int:
    return 2 if itemsize == 8 else 1


def row_words(shape: Sequence[int], itemsize: int) -> int:
    """Words in a row of a tensor of this shape; 1 of a scalar."""
    return max(1, math.prod(shape[1:] if len(shape) > 1 else shape)) * words_per_element(itemsize)


def digest_bytes(
    name: str, content: bytes | memoryview, itemsize: int, shape: Sequence[int]
) -> int:
    """The digest of a whole tensor, in C order as files hold it."""
    words = np.frombuffer(content, _WORDS[itemsize])
    length = row_words(shape, itemsize)
    rows, columns = words.reshape(-1, length), multipliers("column", length)
    total = 0
    with np.errstate(over="ignore"):
        factors = multipliers("row", len(rows)) * np.uint64(name_key(name))
        at_once = max(1, _BLOCK // length)
        for first in range(0, len(rows), at_once):
            some = rows[first : first + at_once].astype(np.int64).view(np.uint64)
            sums = (some * columns).sum(1, dtype=np.uint64)
            total += int((sums * factors[first : first + at_once]).sum(dtype=np.uint64))
    return total & MASK


def digest_value(name: str, value: str) -> int:
    """The digest of a plain value, given as text."""
    return key64("ledger", "value", name, value)


def digest_samples(
    places: npt.NDArray[np.int64],
    samples: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    checksums: npt.NDArray[np.uint32] | None,
) -> int:
    """The digest of samples [B] at places [B] of a step, with labels and CRC-32C of files."""
    with np.errstate(over="ignore"):
        mixed = mix64(samples.astype(np.uint64) + np.uint64(key64("ledger", "sample")))
        mixed = mix64(mixed + labels.astype(np.uint64))
        if checksums is not None:
            mixed = mix64(mixed + checksums.astype(np.uint64))
        mixed = mix64(mixed + places.astype(np.uint64))
        return int(mixed.sum(dtype=np.uint64))
