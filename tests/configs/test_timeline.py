"""Which samples each step takes, against a walk through the steps."""

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.configs.batch import Doubling, LinearGrowth, Stages, timeline
from bigbatch.configs.durations import Length, parse
from bigbatch.configs.errors import UserError
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.load import load_recipe
from bigbatch.configs.schema import Recipe
from bigbatch.configs.timeline import Crossings, Timeline, due

EPOCH = 1000
STAGES = "global_batch={name: stages, pieces: [{batch: 64, until: 1 epochs}, {batch: 256}]}"

CHANGES = st.lists(
    st.tuples(st.integers(0, 3000), st.integers(1, 20).map(lambda k: 16 * k)), max_size=5
).map(lambda found: sorted(found, key=lambda change: change[0]))


def walk(first: int, changes: list[tuple[int, int]], steps: int) -> Iterator[tuple[int, int]]:
    """(position, batch) of each step: the batch of the last change at or before the position."""
    position = 0
    for _ in range(steps):
        batch = ([first] + [b for samples, b in changes if samples <= position])[-1]
        yield position, batch
        position += batch


@given(st.integers(1, 20).map(lambda k: 16 * k), CHANGES)
def test_every_sample_is_in_one_step_and_the_batch_follows_from_the_position(
    first: int, changes: list[tuple[int, int]]
) -> None:
    line = Timeline.changing(first, changes, EPOCH)
    before = 0
    for step, (position, batch) in enumerate(walk(first, changes, 120)):
        assert (line.first(step), line.batch(step)) == (position, batch)
        assert line.shrinks(step) == (batch < before)
        before = batch
        assert line.units(step) * line.unit == position
    assert line.unit == math.gcd(*line.batches)


@given(CHANGES, st.integers(0, 6000))
def test_the_fewest_steps_that_reach_a_sample(changes: list[tuple[int, int]], samples: int) -> None:
    line = Timeline.changing(48, changes, EPOCH)
    step = line.reaching(samples)
    assert line.first(step) >= samples
    assert step == 0 or line.first(step - 1) < samples
    units = samples // 16
    most = line.within(units)
    assert line.units(most) <= units < line.units(most + 1)


@given(CHANGES, st.integers(1, 40), st.integers(0, 60))
def test_what_repeats_by_samples_is_due_where_a_multiple_is_reached_or_passed(
    changes: list[tuple[int, int]], period: int, start: int
) -> None:
    line = Timeline.changing(48, changes, EPOCH)
    every = Crossings(line, period, start)
    found = []
    for step in range(1, 60):
        passed = range(line.units(step - 1) + 1, line.units(step) + 1)
        if any(units > start and (units - start) % period == 0 for units in passed):
            found.append(step)
        assert due(every, step) == (found[-1:] == [step])
    assert list(every.steps(59)) == found


@given(
    st.integers(1, 5000),
    st.integers(1, 10**5),
    st.floats(0.001, 1e6),
    st.sampled_from(["epochs", "samples", "steps"]),
)
def test_of_a_constant_batch_all_is_counted_in_steps_as_ever(
    batch: int, epoch: int, value: float, unit: str
) -> None:
    line, length = Timeline.constant(batch, epoch), Length(value, unit)
    assert line.steps(length) == line.every(length) == length.steps(batch, epoch)
    assert (line.unit, line.first(7), line.units(7), line.batch(7)) == (batch, 7 * batch, 7, batch)


@pytest.mark.parametrize(
    ("length", "steps"),
    [("0 epochs", 0), ("1 epochs", 16), ("1025 samples", 17), ("17 steps", 17), ("3 epochs", 24)],
)
def test_lengths_from_the_start_fall_into_steps_of_either_batch(length: str, steps: int) -> None:
    # 16 steps of 64 are 1,024 samples, the first whole number of steps that is an epoch.
    line = load_recipe("digits", [STAGES, "micro_batch=64", *PLAIN]).timeline(EPOCH)
    assert line.stretches == ((0, 16), (64, 256))
    assert line.steps(parse(length)) == steps


PLAIN = ("schedule={name: constant}",)


def test_each_kind_of_change() -> None:
    stages = Stages.model_validate(
        {
            "name": "stages",
            "pieces": [
                {"batch": 100, "until": "1 epochs"},
                {"batch": 200, "until": "1500 samples"},
                {"batch": 50},
            ],
        }
    )
    assert timeline(stages, EPOCH).stretches == ((0, 10, 13), (100, 200, 50))
    doubling = Doubling.model_validate(
        {"name": "doubling", "start": 50, "every": "500 samples", "most": 400}
    )
    assert timeline(doubling, EPOCH).stretches == ((0, 10, 15, 18), (50, 100, 200, 400))
    linear = LinearGrowth.model_validate(
        {"name": "linear", "start": 100, "end": 400, "until": "1 epochs", "by": 100}
    )
    line = timeline(linear, EPOCH)  # 200 from 334 samples on, 300 from 667, 400 from 1,000
    assert line.stretches == ((0, 4, 6, 7), (100, 200, 300, 400))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 9000))
def test_linear_growth_is_in_proportion_to_the_samples_seen(
    start: int, parts: int, by: int, until: int
) -> None:
    """Independent: start + by x floor(parts x position / until), in exact fractions."""
    grows = LinearGrowth(
        name="linear",
        start=start * by,
        end=(start + parts) * by,
        until=Length(until, "samples"),
        by=by,
    )
    line = timeline(grows, EPOCH)
    for step in range(60):
        position = line.first(step)
        whole = math.floor(min(Fraction(parts * position, until), parts) + Fraction(1, 10**9))
        assert line.batch(step) == (start + whole) * by


def test_a_piece_without_a_step_is_refused() -> None:
    text = "{name: stages, pieces: [{batch: 64, until: 1 epochs}, {batch: 256, until: 1010 samples}"
    recipe = load_recipe("digits", [f"global_batch={text}, {{batch: 512}}]}}", *PLAIN])
    with pytest.raises(UserError, match="epochs of 1,000 samples one of them holds no step"):
        recipe.timeline(EPOCH)


def test_a_branch_keeps_what_both_have_seen() -> None:
    recipe = load_recipe("digits", [STAGES, *PLAIN])
    line, constant = recipe.timeline(EPOCH), Timeline.constant(64, EPOCH)
    assert line.upto(16).stretches == constant.upto(16).stretches
    assert line.upto(17).stretches == line.stretches
    assert line.upto(16).batch(10**6) == 64


@pytest.mark.parametrize(
    ("global_batch", "change", "says"),
    [
        (
            "[{batch: 64, until: 1 epochs}, {batch: 100}]",
            "",
            "steps of 100, .* micro_batch 64; cho",
        ),
        ("[{batch: 64, until: 9 steps}, {batch: 128}]", "", "until = 9 steps: .*epochs or samples"),
        (
            "[{batch: 64, until: 1 epochs}, {batch: 128}]",
            "schedule.warmup=5 steps",
            "warmup = 5 st",
        ),
        (
            "[{batch: 64, until: 2 epochs}, {batch: 128, until: 1 epochs}, {batch: 64}]",
            "",
            "piece 2",
        ),
        ("[{batch: 64, until: 2 epochs}, {batch: 64}]", "", "change nothing"),
        ("[{batch: 64}, {batch: 128}]", "", "piece 1 of 2"),
        (
            "[{batch: 64, until: 1 epochs}, {batch: 128}]",
            "data.lanes=2",
            "does not divide the 1 mi",
        ),
        ("[{batch: 64, until: 1 epochs}, {batch: 128}]", "data.repeats=2", "a step has 1 micro-b"),
        (
            "[{batch: 64, until: 1 epochs}, {batch: 128}]",
            "optimizer={name: lbfgs, lr: 1}",
            "lbfgs .* set global_batch to a number",
        ),
    ],
)
def test_contradictions_are_refused_with_the_remedy(
    global_batch: str, change: str, says: str
) -> None:
    text = f"global_batch={{name: stages, pieces: {global_batch}}}"
    with pytest.raises(UserError, match=says):
        load_recipe("digits", [text, *([change] if change else [])], say=None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{name: doubling, start: 64, every: 1 epochs, most: 200}", "write such as 256"),
        ("{name: doubling, start: 64, every: 1 epochs, most: 64}", "write such as 128"),
        ("{name: linear, start: 64, end: 320, until: 1 epochs, by: 100}", "no whole number of p"),
        ("{name: linear, start: 64, end: 320, until: 1 steps, by: 64}", "epochs or samples"),
        (
            "{name: steps}",
            "did you mean stages\\? there are stages, doubling, linear, noise_scale, post_local, a",
        ),
        ("0", "greater than or equal to 1"),
    ],
)
def test_what_is_no_batch_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("digits", [f"global_batch={text}"], say=None)


def test_a_number_is_the_recipe_that_it_was() -> None:
    def tree(recipe: Recipe) -> object:
        return recipe.model_dump(mode="json")["global_batch"]

    recipe = load_recipe("digits")
    assert tree(recipe) == 256
    assert recipe_hash(recipe) == "2967dbcc3efa642a"  # of before a batch could change
    changing = load_recipe("digits", [STAGES, *PLAIN])
    assert Recipe.model_validate(changing.model_dump(mode="json")) == changing
    assert recipe_hash(changing) != recipe_hash(load_recipe("digits", PLAIN))


def test_timelines_compare_by_what_they_say() -> None:
    line = Timeline.constant(64, EPOCH)
    assert replace(line) == line
