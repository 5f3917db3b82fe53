"""Reading a sweep whose curve is known."""

import numpy as np
import pytest

from bigbatch.configs.errors import UserError
from bigbatch.trainers.advice.lr_range import analyse, divergence, draw

LR = np.geomspace(1e-4, 10, 150)


def curve(noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """From 2.3 down to 0.4 by a logistic fall around 1e-2; it explodes from 1 on."""
    fall = 2.3 - 1.9 / (1 + np.exp(-4 * np.log10(LR / 1e-2)))
    explosion = np.exp(np.minimum(12 * np.maximum(np.log10(LR), 0), 50)) - 1
    return fall + explosion + noise * np.random.default_rng(seed).standard_normal(len(LR))


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("seed", range(5))
def test_readings_of_a_known_curve(noise: float, seed: int) -> None:
    found = analyse(LR.tolist(), curve(noise, seed).tolist())
    assert found.diverged
    assert 1.0 < found.lr[-1] < 5.0
    assert 0.005 < found.steepest < 0.02
    assert 0.01 < found.tenth < 0.11  # the minimum lies between the fall and the explosion


def test_divergence() -> None:
    assert divergence(curve().tolist()) is not None
    assert divergence([2.0, 1.0, 0.5]) is None
    assert divergence([2.0, 1.0, float("nan"), 0.5]) == 2
    assert divergence([1.0] * 20 + [1000.0]) == 20
    assert divergence([]) is None


def test_what_cannot_be_read_is_said() -> None:
    flat = 2.3 + 0.1 * np.random.default_rng(0).standard_normal(100)
    with pytest.raises(UserError, match=r"less than it varies .* higher rates with --to"):
        analyse(np.logspace(-8, -6, 100).tolist(), flat.tolist())
    with pytest.raises(UserError, match="did not fall"):
        analyse(LR.tolist(), np.linspace(1, 3, len(LR)).tolist())
    with pytest.raises(UserError, match="diverged after 3 steps"):
        analyse(LR.tolist(), [1.0, 1.0, 1.0, float("inf"), *[1.0] * (len(LR) - 4)])


def test_a_sweep_without_divergence_is_read_to_its_end(tmp_path) -> None:
    found = analyse(LR[:80].tolist(), curve()[:80].tolist())
    assert not found.diverged
    assert len(found.lr) == 80
    draw(found, "digits", tmp_path / "lr.png")
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"
