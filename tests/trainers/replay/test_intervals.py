"""Which intervals are drawn, and that what is wrong is met as often as the formula says."""

import math
from itertools import combinations

import pytest

from bigbatch.trainers.replay.intervals import Interval, detection, draw, drawn_of


def line(count: int) -> list[Interval]:
    return [Interval(3 * i, 3 * i + 3) for i in range(count)]


@pytest.mark.parametrize(
    ("total", "fraction", "drawn"),
    [(20, 0.25, 5), (20, 0.001, 1), (3, 0.34, 2), (10, 0.3, 3), (7, 1.0, 7), (1, 0.5, 1)],
)
def test_a_share_is_rounded_up(total: int, fraction: float, drawn: int) -> None:
    every = line(total)
    assert drawn_of(total, fraction) == drawn
    found = draw(every, fraction, "run", 1)
    assert len(set(found)) == len(found) == drawn
    assert found == sorted(found, key=lambda one: one.first)
    assert set(found) <= set(every)


def test_a_draw_follows_from_run_and_seed() -> None:
    every = line(40)
    assert draw(every, 0.1, "a", 7) == draw(every, 0.1, "a", 7)
    assert len({tuple(draw(every, 0.1, "a", seed)) for seed in range(20)}) > 15
    assert draw(every, 0.1, "b", 7) != draw(every, 0.1, "a", 7)


def test_the_formula_counts_all_draws() -> None:
    """Against all C(7, 3) of them."""
    for tampered in range(8):
        draws = list(combinations(range(7), 3))
        met = sum(any(place < tampered for place in one) for one in draws)
        assert detection(7, 3, tampered) == pytest.approx(met / len(draws), abs=1e-12)


@pytest.mark.parametrize(
    ("total", "fraction", "tampered"), [(20, 0.25, 1), (20, 0.25, 2), (40, 0.1, 5), (9, 0.5, 1)]
)
def test_detection_over_200_draws(total: int, fraction: float, tampered: int) -> None:
    """Tampered intervals lie anywhere: here at the begin, and spread out."""
    every, trials = line(total), 200
    expected = detection(total, drawn_of(total, fraction), tampered)
    spread = math.sqrt(trials * expected * (1 - expected))
    for wrong in (set(every[:tampered]), set(every[:: total // tampered][:tampered])):
        met = sum(bool(wrong & set(draw(every, fraction, "run", seed))) for seed in range(trials))
        assert abs(met - trials * expected) < 3 * spread
