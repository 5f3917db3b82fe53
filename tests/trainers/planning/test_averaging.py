"""Which weights enter an average, and that what does not fit into a run is refused."""

import math
from typing import Any

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.trainers.planning.averaging import Averaging
from bigbatch.trainers.planning.inputs import fit

EPOCH = 1000  # samples
USUAL = ("global_batch=100", "micro_batch=50", "duration=10 epochs", "schedule.warmup=0 steps")


def plan(average: str, *changes: str) -> Averaging:
    recipe = load_recipe("digits", [*USUAL, f"average={average}", *changes])
    found = fit(recipe, EPOCH)[0].average
    assert found is not None
    return found


def test_by_default_there_is_none() -> None:
    assert fit(load_recipe("digits"), EPOCH)[0].average is None


@pytest.mark.parametrize(
    ("half_life", "samples"), [("500 samples", 500), ("20 steps", 2000), ("0.35 epochs", 350)]
)
def test_the_half_life_is_in_samples(half_life: str, samples: int) -> None:
    found = plan(f"{{name: ema, half_life: {half_life}}}")
    assert found.steps == range(1, 101)
    assert math.exp(-found.decay_rate * samples / 100) == pytest.approx(0.5, rel=1e-12)


def test_the_decay_of_a_batch_k_times_as_large_is_that_of_k_steps() -> None:
    ema = "{name: ema, half_life: 3k samples}"
    rate = plan(ema).decay_rate
    for k in (2, 5):
        assert plan(ema, f"global_batch={k * 100}").decay_rate == pytest.approx(k * rate)
    assert plan(ema, "micro_batch=10").decay_rate == rate


@pytest.mark.parametrize(
    ("average", "steps"),
    [
        ("{name: ema, half_life: 1 epochs, start: 3 epochs}", range(31, 101)),
        ("{name: swa, start: 8 epochs}", [80, 90, 100]),
        ("{name: swa, start: 0 steps, every: 30 steps}", [30, 60, 90]),
        ("{name: swa, start: 1 steps, every: 3k samples}", [1, 31, 61, 91]),
        ("{name: swa, start: 98 steps, every: 1 steps}", [98, 99, 100]),
        # Cycles of digits: three, as long as each other.
        ("{name: swa, start: 0 steps, every: cycle}", [34, 67, 100]),
        ("{name: swa, start: 67 steps, every: cycle}", [67, 100]),
    ],
)
def test_the_steps_whose_weights_enter(average: str, steps: Any) -> None:
    found = plan(average)
    assert [step for step in range(102) if step in found.steps] == list(steps)
    assert len(found.steps) == len(list(steps))
    assert (found.decay_rate == 0) == ("swa" in average)


@pytest.mark.parametrize(
    ("average", "says"),
    [
        ("{name: ema, half_life: 99 samples}", "99 samples, less than the 100 of one step.* 10 st"),
        ("{name: ema, half_life: 0.05 epochs}", "0.05 epochs is 50 samples"),
        ("{name: ema, half_life: 1 epochs, start: 10 epochs}", "step 100 of 100: no set of w"),
        ("{name: ema, half_life: 1 epochs, start: 99 steps}", "step 99 of 100: one set of w"),
        ("{name: swa, start: 11 epochs}", "step 110 of 100: no set"),
        ("{name: swa, start: 8 epochs, every: 3 epochs}", "one set .*make average.every shorter"),
        ("{name: swa, start: 90 steps, every: cycle}", "one set of weights would enter"),
    ],
)
def test_what_makes_no_average_is_refused(average: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan(average)
