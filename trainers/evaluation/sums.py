"""Sums that come out the same in whatever order, and by whichever rank, their terms are added."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_COARSE, _FINE = 2.0**20, 2.0**50


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


def _split(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    coarse = np.rint(values * _COARSE) / _COARSE
    return coarse, np.rint((values - coarse) * _FINE) / _FINE
