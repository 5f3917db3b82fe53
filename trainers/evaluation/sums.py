"""Sums that come out the same in whatever order, and by whichever rank, their terms are added."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COARSE, _FINE = 2.0**20, 2.0**50
_WAITING = 2**16  # terms that are not joined at least


class ExactSum:
    """Sums of float64 terms, each rounded to a multiple of 2^-50.

    A term is kept as a multiple of 2^-20 and what is left of it: sums of either are exact in
    float64 up to 2^33, so that neither the order of terms nor who adds them up changes a bit.
    `parts` [2, ...] of several ranks may be added up.
    """

    def __init__(self, *shape: int) -> None:
        self.parts = np.zeros((2, *shape))

    def add(self, values: NDArray[np.float64], where: Any = ...) -> None:
        """Terms, one for each place of `where`."""
        for part, terms in zip(self.parts, _split(values), strict=True):
            part[where] += terms

    def add_at(self, where: Any, values: NDArray[np.float64]) -> None:
        """Terms of places that may occur several times."""
        for part, terms in zip(self.parts, _split(values), strict=True):
            np.add.at(part, where, terms)

    @property
    def total(self) -> NDArray[np.float64]:
        total: NDArray[np.float64] = self.parts[0] + self.parts[1]
        return total


class SparseSum:
    """`ExactSum` over places of which few occur: kept are those, and what waits to join them."""

    def __init__(self) -> None:
        self._keys = np.zeros(0, np.int64)
        self._parts = np.zeros((2, 0))
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
        self._count = 0

    def add_at(self, keys: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Terms of places, by number, that may occur several times."""
        self._wait(keys, np.stack(_split(values)))

    def _wait(self, keys: NDArray[np.int64], parts: NDArray[np.float64]) -> None:
        self._waiting.append((keys, parts))
        self._count += len(keys)
        if self._count > max(_WAITING, len(self._keys)):
            self._join()

    def _join(self) -> None:
        keys, parts = zip((self._keys, self._parts), *self._waiting, strict=True)
        self._keys, where = np.unique(np.concatenate(keys), return_inverse=True)
        of_all = np.concatenate(parts, axis=1)
        self._parts = np.stack([np.bincount(where, part, len(self._keys)) for part in of_all])
        self._waiting, self._count = [], 0

    def rows(self) -> NDArray[np.float64]:
        """Numbers of places and their two parts [K, 3], in which form ranks pass them on."""
        self._join()
        return np.concatenate([self._keys[:, None].astype(np.float64), self._parts.T], axis=1)

    def put(self, rows: Sequence[NDArray[np.float64]]) -> None:
        """Take the sums of these, of all ranks, in place of its own."""
        self.__init__()  # type: ignore[misc]
        for each in rows:
            self._wait(each[:, 0].astype(np.int64), each[:, 1:].T)

    @property
    def total(self) -> NDArray[np.float64]:
        """The sum of each place that occurs, in their order."""
        self._join()
        total: NDArray[np.float64] = self._parts[0] + self._parts[1]
        return total


def _split(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    coarse = np.rint(values * _COARSE) / _COARSE
    return coarse, np.rint((values - coarse) * _FINE) / _FINE
