"""Keyed randomness: numbers that depend on their key alone, never on who draws them.

Both functions are written out rather than taken from a library's generator, because a
library may change its stream between versions and a resumed run must not notice.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key64(*parts: int | str) -> int:
    """A 64-bit key from any integers and strings; (1, 0), (0, 1) and ("1", 0) all differ."""
    text = "".join(f"s{len(p)}:{p}" if isinstance(p, str) else f"i{int(p)};" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al. 2014): a bijection whose bits look random."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniforms(shape: tuple[int, ...], *key: int | str) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), a pure function of the key: SplitMix64 in counter mode."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * _GOLDEN
        bits = mix64(counter + np.uint64(key64(*key)))
    return np.ldexp((bits >> np.uint64(11)).astype(np.float64), -53).reshape(shape)
