"""Codebooks: few values, found by k-means, and kept to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from bigbatch.trainers.compress.codebook import cluster, encode, share_weights
from bigbatch.trainers.compress.pruning import prunable
from bigbatch.trainers.models.compressed import decode
from tests.trainers.compress.networks import network, same_state, state


@pytest.mark.parametrize("count", [2, 8, 32])
def test_finds_what_scikit_learns_kmeans_finds_from_the_same_start(count: int) -> None:
    values = np.random.default_rng(0).beta(2, 3, 2000).astype(np.float32)
    start = np.linspace(values.min(), values.max(), count)[:, None].astype(np.float64)
    oracle = KMeans(count, init=start, n_init=1, max_iter=300, tol=0, algorithm="lloyd")
    oracle.fit(values.astype(np.float64)[:, None])
    centroids, indices = cluster(values, count)
    np.testing.assert_allclose(centroids, np.sort(oracle.cluster_centers_.ravel()), atol=1e-6)
    assert np.square(values - centroids[indices]).sum() == pytest.approx(oracle.inertia_, rel=1e-5)


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40), st.sampled_from([2, 4, 16]))
def test_every_number_is_with_its_nearest_centroid_which_is_the_mean(
    numbers: list[float], count: int
) -> None:
    values = np.array(numbers, np.float32)
    centroids, indices = cluster(values, count)
    assert len(centroids) == count
    assert (np.diff(centroids) >= 0).all()
    distances = np.abs(values[:, None].astype(np.float64) - centroids)
    own = distances[np.arange(len(values)), indices]
    np.testing.assert_allclose(own, distances.min(axis=1), atol=1e-5)
    for number in np.unique(indices):
        mean = values[indices == number].astype(np.float64).mean()
        assert centroids[number] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_network_keeps_few_values_and_comes_back_bit_for_bit(bits: int) -> None:
    model = network()
    before = state(model)
    tensors = encode(model, bits)
    small = share_weights(model, bits)
    assert same_state(model, before)
    again = network(seed=1)
    again.load_state_dict(decode(tensors, again))
    assert same_state(again, state(small))
    shared = 0
    for name, tensor in prunable(small).items():
        if f"{name}.codebook" in tensors:
            shared += 1
            assert len(tensor.unique()) <= 2**bits
            packed = tensors[f"{name}.indices"]
            assert packed.dtype == torch.uint8
            assert len(packed) == -(-tensor.numel() * bits // 8)
    assert shared > 10
    rest = {n: t for n, t in small.state_dict().items() if f"{n}.codebook" not in tensors}
    assert all(torch.equal(tensor, before[name]) for name, tensor in rest.items())
