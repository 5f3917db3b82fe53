"""Predictions of members that are right more often than not, and differ from each other."""

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from bigbatch.trainers.evaluation.metrics import softmax


def predictions(
    samples: int, classes: int, members: int = 3, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities [M, N, C] and labels [N]; members share half of their noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, samples)
    shared = generator.normal(size=(samples, classes))
    shared[np.arange(samples), labels] += 2
    own = generator.normal(size=(members, samples, classes))
    return np.stack([softmax(shared + noise) for noise in own]), labels


@st.composite
def small_predictions(
    draw: st.DrawFn, members: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities [M, N, C] with ties and zeros, and labels [N]."""
    samples, classes = draw(st.integers(2, 12)), draw(st.integers(1, 5))
    size = members * samples * classes
    weights = draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    table = np.array(weights, np.float64).reshape(members, samples, classes)
    table[table.sum(axis=2) == 0] = 1
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=samples, max_size=samples))
    return table / table.sum(axis=2, keepdims=True), np.array(labels, np.int64)
