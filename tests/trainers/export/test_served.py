"""Pixels to probabilities in one network, against NumPy and each member's own evaluation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.ensemble.trees import Trees
from bigbatch.trainers.export.combine import Combine
from bigbatch.trainers.export.preprocess import CentreCrop
from bigbatch.trainers.export.served import Served, ServedMember
from tests.trainers.export.test_preprocess import evaluated, noise

CLASSES = 5
ROWS = tuple(
    tuple(row) for row in np.random.default_rng(7).normal(size=(CLASSES, 3 * CLASSES)).tolist()
)
# Two trees, one of two questions and one of a leaf alone, and a class that has none.
TREES = Trees(
    features=3 * CLASSES,
    baseline=(0.1, -0.2, 0.3, 0.0, 0.5),
    roots=(0, 5),
    outputs=(1, 4),
    feature=(2, -1, 11, -1, -1, -1),
    number=(-1.5, 2.0, -3.0, -1.0, 0.7, 0.9),
    left=(1, 0, 3, 0, 0, 0),
    right=(2, 0, 4, 0, 0, 0),
)
COMBINATIONS = {
    "mean": Combination(),
    "logits": Combination("logits"),
    "weights": Combination("weights", weights=(0.7, 0.0, 0.3)),
    "vote": Combination("vote"),
    "boost": Combination("boost", trees=TREES),
    "stack": Combination("stack", coefficients=ROWS, intercepts=(0.1, 0.2, 0.3, -0.1, -0.5)),
}


class Small(nn.Module):
    """A network with logits far apart, and what training has that evaluation lacks."""

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(channels, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.convolution(images)).relu().mean((2, 3))
        logits: Tensor = 8 * self.head(self.dropout(features))
        return logits


def member(seed: int = 0, **changes: object) -> ServedMember:
    plain = ServedMember(
        name=f"run/cycle-{seed:02d}",
        network=Small(3, seed).eval(),
        image_size=24,
        crop_fraction=0.875,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
    )
    return replace(plain, **changes)


def by_hand(members: list[ServedMember], combination: Combination, pixels: Tensor) -> np.ndarray:
    """Probabilities float64 [N, C], by evaluation's own parts."""
    logits = []
    for m in members:
        images = evaluated(pixels, m.image_size, m.crop_fraction, m.squash)
        mean, std = (torch.tensor(values)[:, None, None] for values in (m.mean, m.std))
        with torch.no_grad():
            logits.append(m.network((images - mean) / std).numpy())
    return combination.apply(np.stack(logits))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_combines_as_numpy_does(name: str, temperature: float) -> None:
    combination = replace(COMBINATIONS[name], temperature=temperature)
    logits = np.random.default_rng(1).normal(0, 8, (3, 200, CLASSES)).astype(np.float32)
    found = Combine(combination, 3)(torch.from_numpy(logits)).numpy()
    assert len({tuple(row) for row in found.round(3)}) >= 3
    np.testing.assert_allclose(found, combination.apply(logits), rtol=0, atol=2e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("method", ["mean", "logits", "vote"])
def test_no_probability_is_above_one(method: str) -> None:
    """A float32 mean of members reaches 1.0000001."""
    tenths = np.full(10, 0.1, np.float32)
    assert sum(tenths, np.float32(0)) > 1
    logits = np.random.default_rng(3).normal(0, 30, (10, 5_000, 3)).astype(np.float32)
    logits[:, :100, 0] += 1000  # of which all members are sure
    found = Combine(Combination(method), 10)(torch.from_numpy(logits))
    assert found.max() <= 1
    assert found.min() >= 0
    assert (found[:100, 0] == 1).all() or method == "vote"


def test_members_see_their_own_images() -> None:
    members = [
        member(1),
        member(2, mean=(0.1, 0.2, 0.3)),
        member(3, image_size=40, crop_fraction=1.0),
        member(4, image_size=(24, 40), crop_fraction=1.0, squash=True),
        member(5, image_size=(24, 40), crop_fraction=1.0),
    ]
    for shape in ((3, 50, 70, 3), (1, 31, 24, 3)):
        pixels = noise(*shape)
        probabilities, label = Served(members, Combination())(pixels)
        expected = by_hand(members, Combination(), pixels)
        np.testing.assert_allclose(probabilities.detach(), expected, rtol=0, atol=1e-5)
        assert label.tolist() == expected.argmax(1).tolist()


def test_what_members_see_alike_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = CentreCrop.forward

    def counted(self: CentreCrop, pixels: Tensor) -> Tensor:
        calls.append(self.out)
        return forward(self, pixels)

    monkeypatch.setattr(CentreCrop, "forward", counted)
    members = [member(1), member(2), member(3, mean=(0.0, 0.0, 0.0)), member(4, image_size=40)]
    Served(members, Combination())(noise(1, 50, 50, 3))
    assert sorted(calls) == [(24, 24), (40, 40)]


def test_one_member_and_one_channel() -> None:
    gray = member(1, network=Small(1, 1).eval(), mean=(0.3,), std=(0.4,))
    pixels = noise(4, 30, 30, 1)
    served = Served([gray], Combination())
    assert (served.channels, served.outputs) == (1, ("probabilities", "label"))
    expected = by_hand([gray], Combination(), pixels)
    np.testing.assert_allclose(served(pixels)[0].detach(), expected, rtol=0, atol=1e-5)


def test_predictions_below_the_threshold_are_rejected() -> None:
    members, pixels = [member(1), member(2)], noise(50, 30, 30, 3)
    confidence = by_hand(members, Combination(), pixels).max(1)
    combination = Combination(reject_below=float(np.median(confidence)))
    served = Served(members, combination)
    rejected = served(pixels)[2]
    assert served.outputs[2] == "rejected"
    assert rejected.dtype == torch.bool
    expected = ~combination.accepted(by_hand(members, combination, pixels))
    assert rejected.tolist() == expected.tolist()
    assert 0 < rejected.sum() < 50


def test_is_in_eval_mode_whatever_its_networks_were() -> None:
    plain, training = member(1), member(1)
    training.network.train()
    pixels = noise(3, 30, 30, 3)
    first, second = (Served([m], Combination())(pixels)[0] for m in (plain, training))
    assert torch.equal(first, second)


def test_what_cannot_be_one_network_is_refused() -> None:
    gray = member(2, network=Small(1, 2), mean=(0.3,), std=(0.4,))
    with pytest.raises(ValueError, match="channels"):
        Served([member(1), gray], Combination())
    with pytest.raises(ValueError, match="3"):
        Served([member(1), member(2)], COMBINATIONS["weights"])
