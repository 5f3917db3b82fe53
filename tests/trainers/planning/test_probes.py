"""When a run looks at itself, and what that may cost."""

from hypothesis import given
from hypothesis import strategies as st

from bigbatch.configs.load import load_recipe
from bigbatch.trainers.planning.plan import make_plan
from bigbatch.trainers.planning.probes import plan_probes


@given(st.integers(1, 10**6), st.integers(1, 65536), st.integers(1, 10**5))
def test_probes_stand_at_evaluations_and_stay_cheap(total: int, batch: int, every: int) -> None:
    probes = plan_probes(range(every, total + every, every), total, total * batch)
    assert total in probes.steps
    assert all(step % every == 0 or step == total for step in probes.steps)
    assert 1 <= len(probes.steps) <= 8
    assert 64 <= probes.images <= 512
    if total * batch > 10_000:  # of shorter runs there is one of the smallest all the same
        assert len(probes.steps) * probes.images <= 0.0075 * total * batch
        assert min(every, total) in probes.steps or len(probes.steps) == 1


def test_a_long_run_has_eight_the_first_early() -> None:
    probes = plan_probes(range(5000, 455_000, 5000), 450_000, 450_000 * 256)
    assert (len(probes.steps), probes.images) == (8, 512)
    assert min(probes.steps) == 5000
    assert [probes.gradients(step) for step in (1, 2, 5000, 450_000)] == [True, False, True, True]


def test_the_recipe_turns_them_off() -> None:
    off = make_plan(load_recipe("digits", ["log.diagnosis=false"], say=None), 1078)
    assert off.probes.steps == frozenset()
    assert not off.probes.gradients(1)
    assert make_plan(load_recipe("digits", [], say=None), 1078).probes.gradients(1)
