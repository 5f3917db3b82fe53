"""Unstructured pruning: which weights go, and that they stay away."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bigbatch.trainers.compress.pruning import (
    apply_masks,
    magnitudes,
    masks_of,
    prunable,
    prune,
    taylor_scores,
)
from tests.trainers.compress.networks import batch, network, same_state, state


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=4),
    st.floats(0.01, 0.99),
)
def test_exactly_the_share_with_the_lowest_scores_goes(
    scores: list[list[int]], share: float
) -> None:
    tensors = {str(i): torch.tensor(own, dtype=torch.float32) for i, own in enumerate(scores)}
    masks = masks_of(tensors, share)
    places = [(score, i) for i, score in enumerate(s for own in scores for s in own)]
    gone = {i for _, i in sorted(places)[: round(share * len(places))]}  # brute force
    flat = torch.cat([masks[name].flatten() for name in tensors])
    assert {i for i, kept in enumerate(flat.tolist()) if not kept} == gone
    assert all(masks[name].shape == tensors[name].shape for name in tensors)


def test_pruning_by_magnitude_is_global_and_leaves_norms_and_the_input_alone() -> None:
    model = network()
    before = state(model)
    pruned = prune(model, masks_of(magnitudes(model), 0.8))
    assert same_state(model, before)
    weights = prunable(pruned)
    everything = torch.cat([before[name].flatten().abs() for name in weights])
    threshold = everything.sort().values[round(0.8 * len(everything))]
    for name, weight in weights.items():
        kept = before[name].abs() >= threshold
        assert torch.equal(weight, before[name] * kept), name
    changed = {n for n, t in pruned.state_dict().items() if not torch.equal(t, before[n])}
    assert changed <= weights.keys()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(f"{n}.weight" in weights for n, m in model.named_modules() if m in norms)


def test_no_weight_becomes_minus_zero() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[-1.0, 2.0]])
    apply_masks(layer, {"weight": torch.tensor([[False, True]])})
    assert str(layer.weight.data[0, 0].item()) == "0.0"


def test_taylor_score_is_what_the_loss_changes_by_without_the_weight() -> None:
    """|w dL/dw| against a central difference in the direction of the weight, in float64."""
    model = network().double()
    before = state(model)
    images, labels = batch(6)
    images = images.double()
    scores = taylor_scores(model, [(images, labels)])
    assert same_state(model, before)

    def loss(name: str, place: tuple[int, ...], factor: float) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            dict(other.named_parameters())[name][place] *= factor
            return F.cross_entropy(other(images), labels).item()

    for name in ("conv1.0.weight", "layer2.0.conv1.weight", "fc.weight"):
        for flat in (0, 5, 11):
            place = tuple(
                int(i) for i in torch.unravel_index(torch.tensor(flat), scores[name].shape)
            )
            step = 1e-6
            slope = (loss(name, place, 1 + step) - loss(name, place, 1 - step)) / (2 * step)
            assert scores[name][place].item() == pytest.approx(abs(slope), rel=1e-4, abs=1e-9)


def test_taylor_scores_of_batches_add_up_and_frozen_weights_have_one() -> None:
    model = network().requires_grad_(False)
    first, second = batch(4, seed=1), batch(4, seed=2)
    together = taylor_scores(model, [first, second])
    alone = [taylor_scores(model, [b]) for b in (first, second)]
    for name, score in together.items():
        torch.testing.assert_close(score, alone[0][name] + alone[1][name])
        assert score.sum() > 0
