"""How often a run evaluates and saves, counted without going through its steps."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from bigbatch.configs.load import load_recipe
from bigbatch.trainers.planning.plan import make_plan

PERIOD = st.integers(1, 40)


@given(st.integers(1, 300), PERIOD, PERIOD, st.none() | PERIOD, st.booleans())
def test_counts_are_those_of_a_walk_through_the_steps(
    total: int, evaluate: int, save: int, keep: int | None, may_stop: bool
) -> None:
    plan = replace(
        make_plan(load_recipe("digits"), 1000),
        total=total,
        stop=total,
        evaluate_every=evaluate,
        save_every=save,
        keep_every=keep,
        may_stop=may_stop,
    )
    steps = range(1, total + 1)
    assert plan.evaluations() == sum(map(plan.evaluates, steps))
    assert plan.checkpoints() == sum(map(plan.saves, steps))


def test_a_hundred_million_steps_cost_nothing() -> None:
    plan = make_plan(load_recipe("digits", ["duration=100000000 steps"]), 1000)
    assert plan.evaluations() == -(-plan.total // plan.evaluate_every)
    assert plan.total == 10**8
