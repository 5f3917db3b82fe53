"""A batch that changes: what falls on which step, against formulas of the samples seen."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.schema import Recipe
from bigbatch.data.batch import BatchPlan
from bigbatch.trainers.optim.averaging import newest_share
from bigbatch.trainers.planning.inputs import batches_in_words, fit
from bigbatch.trainers.planning.plan import Plan, check_world, fits, make_plan
from bigbatch.trainers.planning.plateau import Evaluation
from bigbatch.trainers.planning.sizes import image_sizes

EPOCH = 1000
# 16 steps of 64 (1,024 samples), 8 of 128 (2,048 samples), then 256.
BATCHES = "{name: stages, pieces: [{batch: 64, until: 1 epochs}, {batch: 128, until: 2 epochs}"
USUAL = (
    *(f"global_batch={BATCHES}, {{batch: 256}}]}}", "micro_batch=32", "duration=6 epochs"),
    *("schedule={name: cosine, warmup: 500 samples}", "log.diagnosis=true"),
)


def load(*changes: str) -> Recipe:
    return load_recipe("digits", [*USUAL, *changes], say=None)


def plan_of(*changes: str) -> Plan:
    return make_plan(load(*changes), EPOCH)


def test_the_steps_of_a_run() -> None:
    plan = plan_of(
        "evaluate.every=1 epochs", "checkpoint={every: 500 samples, keep_every: 5 steps}"
    )
    assert plan.timeline.stretches == ((0, 16, 24), (64, 128, 256))
    assert plan.total == 24 + math.ceil((6000 - 2048) / 256) == 40
    assert [plan.micro_batches(step) for step in (0, 15, 16, 23, 24, 39)] == [2, 2, 4, 4, 8, 8]
    seen = [plan.timeline.first(step) for step in range(41)]
    periods = (1000 / 32, 500 / 32)  # in units of 32 samples, rounded up as in steps elsewhere
    for due, period in zip((plan.evaluates, plan.saves), map(math.ceil, periods), strict=True):
        expected = {
            s for s in range(1, 41) if seen[s] // (32 * period) > seen[s - 1] // (32 * period)
        }
        if due == plan.saves:
            expected |= set(range(5, 41, 5))
        assert {s for s in range(1, 41) if due(s)} == expected | {40}
    assert plan.evaluations() == sum(map(plan.evaluates, range(1, 41)))
    assert plan.checkpoints() == sum(map(plan.saves, range(1, 41)))
    assert plan.kept() == 8
    assert plan.probes.steps <= {s for s in range(1, 41) if plan.evaluates(s)}
    assert 40 in plan.probes.steps
    assert batches_in_words(plan) == "64 from step 0, 128 from step 16, 256 from step 24 of 40"


@pytest.mark.parametrize(("rule", "power"), [("none", 0.0), ("linear", 1.0), ("sqrt", 0.5)])
def test_the_rate_is_a_function_of_the_samples_seen(rule: str, power: float) -> None:
    """Independent of the code: cosine over samples, times (batch / first batch) ^ power."""
    scale = "optimizer.scale={rule: linear, base_batch: 128}"  # carries lr to the first batch
    plan, rate = fit(load(f"global_batch.lr={rule}", scale), EPOCH)
    whole = plan.timeline.first(plan.total)
    warmup = 64 * math.ceil(500 / 64)  # in units, of 64 samples
    for step in range(plan.total):
        seen = 64 * step if step < 16 else 1024 + 128 * (step - 16) if step < 24 else None
        seen = 2048 + 256 * (step - 24) if seen is None else seen
        batch = 64 if step < 16 else 128 if step < 24 else 256
        shape = 0.5 * (1 + math.cos(math.pi * (seen - warmup) / (whole - warmup)))
        expected = seen / warmup if seen < warmup else shape
        assert rate(step) == pytest.approx(0.5 * expected * (batch / 64) ** power, rel=1e-12)


def test_statistics_move_as_by_so_many_steps_of_the_first_batch() -> None:
    recipe = load("global_batch.batch_norm=power")
    assert [recipe.batch_norm_power(batch) for batch in (64, 128, 256)] == [1, 2, 4]
    for unchanged in (load(), load("global_batch=128")):
        assert unchanged.batch_norm_power(128) == 1.0


def test_a_number_has_the_rate_that_it_had_bit_for_bit() -> None:
    plan, rate = fit(load("global_batch=128", "schedule={name: cosine, warmup: 5 steps}"), EPOCH)
    rest = plan.total - 5
    for step in range(plan.total):
        shape = 0.0 + 1.0 * 0.5 * (1.0 + math.cos(math.pi * min((step - 5) / rest, 1.0)))
        assert rate(step) == (0.0 + 1.0 * step / 5 if step < 5 else shape)


def test_momentum_follows_the_samples_too() -> None:
    from bigbatch.trainers.planning.inputs import momentum_schedule

    recipe = load(
        "optimizer={name: sgd, lr: 1, momentum: 0.8}",
        "optimizer.momentum_schedule={name: constant, warmup: 1024 samples, warmup_start: 0.5}",
    )
    momentum = momentum_schedule(recipe, make_plan(recipe, EPOCH))
    assert momentum is not None
    assert [momentum(step) for step in (0, 8, 16, 30)] == pytest.approx([0.4, 0.6, 0.8, 0.8])


def test_cycles_end_with_the_step_that_reaches_them() -> None:
    cycles = "schedule={name: cycles, warmup: 0 epochs, rewarmup: 0 epochs, cycles: 3}"
    plan, rate = fit(load(cycles), EPOCH)
    assert plan.timeline.first(plan.total) == 6144
    assert plan.snapshots == {24, 32, 40}  # after 2,048, 4,096 and 6,144 samples
    for end in (24, 32):  # the next cycle begins with the step after it
        assert rate(end) == 1.0 > 0.05 > rate(end - 1)
    ends = make_plan(load(cycles.replace("3", "5")), EPOCH).snapshots
    seen = [plan.timeline.first(end) for end in sorted(ends)]
    wanted = [64 * math.ceil(k * 96 / 5) for k in range(1, 6)]
    assert all(0 <= at - end < 256 for at, end in zip(seen, wanted, strict=True))
    with pytest.raises(UserError, match="each cycle needs at least one step"):
        fit(load(cycles.replace("3", "60")), EPOCH)


def test_a_plateau_counts_evaluations_by_where_they_stand() -> None:
    found: list[Evaluation] = []
    schedule = "schedule={name: plateau, patience: 0, factor: 0.5, warmup: 1024 samples}"
    _, rate = fit(load(schedule), EPOCH, evaluations=found)
    found += [Evaluation(step, {"nll": nll}) for step, nll in ((16, 9.0), (20, 1.0), (28, 2.0))]
    assert [rate(step) for step in (16, 20, 27, 28, 39)] == [1, 1, 1, 0.5, 0.5]


def test_images_grow_with_the_samples_seen() -> None:
    sizes = image_sizes(
        load(
            "data.image_size=64",
            "data.progressive={start: 32, after: 0 epochs, until: 2048 samples, multiple: 8}",
        ),
        EPOCH,
    )
    # Halves of a multiple round up: 36 is 40, after an eighth of the samples.
    assert sizes == ((0, 32), (4, 40), (12, 48), (18, 56), (22, 64))


def test_a_half_life_in_samples_is_one_of_samples_and_one_in_steps_of_steps() -> None:
    """Against the recursion mean = d^(batch) mean + (1 - d^(batch)) w, from its first weights."""
    plan = plan_of("average={name: ema, half_life: 700 samples, start: 3 steps}")
    assert plan.average is not None
    rng, mean, norm, count, ours = np.random.default_rng(0), 0.0, 0.0, 0, 0.0
    for step in range(1, plan.total + 1):
        if step not in plan.average.steps:
            assert step <= 3
            continue
        w, keep = rng.normal(), 0.5 ** (plan.timeline.batch(step - 1) / 700)
        mean, norm = keep * mean + (1 - keep) * w, keep * norm + (1 - keep)
        count += plan.average.updates(step)
        share = newest_share(count, plan.average.decay_rate, plan.average.updates(step))
        ours = (1 - share) * ours + share * w
        assert ours == pytest.approx(mean / norm, rel=1e-9)
    by_steps = plan_of("average={name: ema, half_life: 10 steps}").average
    assert by_steps is not None
    assert by_steps.updates(40) == by_steps.updates(1) == 1
    assert by_steps.decay_rate == pytest.approx(math.log(2) / 10)
    with pytest.raises(UserError, match="less than the 256 of one step"):
        plan_of("average={name: ema, half_life: 200 samples}")


def test_a_plain_average_takes_what_a_constant_batch_would() -> None:
    plan = plan_of("average={name: swa, start: 1024 samples, every: 1 epochs}")
    assert plan.average is not None
    seen = [plan.timeline.first(step) for step in plan.average.steps]
    assert seen[0] == 1024
    assert all(0 <= at - 1024 - 1024 * k < 256 for k, at in enumerate(seen))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_each_position_is_in_one_micro_batch_of_one_rank_at_any_world_size_from_any_step(
    data: st.DataObject,
) -> None:
    """Brute force: also from the step where the batch changes, and with ranks that have none."""
    plan = plan_of()
    line = plan.timeline
    start = data.draw(st.integers(0, 39))
    stop = data.draw(st.integers(start + 1, 40))
    found: list[int] = []
    now = start
    while now < stop:  # a run that is stopped, and goes on with another number of ranks
        until = data.draw(st.integers(now + 1, stop))
        world = data.draw(st.integers(1, 8))
        for rank in range(world):
            for step, number, first in BatchPlan(line, 32, rank, world, now, until).places():
                assert now <= step < until
                assert number % world == rank
                assert first == line.first(step) + 32 * number
                found += range(first, first + 32)
        now = until
    assert sorted(found) == list(range(line.first(start), line.first(stop)))


def test_how_many_ranks_there_may_be() -> None:
    check_world(load(), 8)  # micro-batches of the largest step: ranks wait in the others
    with pytest.raises(UserError, match="9 ranks, but the largest step has only 8 micro-batches"):
        check_world(load(), 9)
    sharded = load("backend=zero1", "reduction=overlapped")
    check_world(sharded, 2)
    with pytest.raises(UserError, match=r"smallest steps have only 2 micro-batches .*backend=ddp"):
        check_world(sharded, 3)


def test_each_rank_trains_whole_workers() -> None:
    apart = "{name: post_local, batch: 256, workers: 6, every: 8, start: 2 epochs}"
    keys = ["global_batch.batch=384", "optimizer={name: sgd, lr: 0.1}", "schedule=cosine"]
    recipe = load_recipe("digits", [f"global_batch={apart}", *keys, "micro_batch=32"], say=None)
    assert [n for n in range(1, 9) if fits(recipe, n)] == [1, 2, 3, 6]
    for world in (4, 8):
        with pytest.raises(
            UserError, match=f"{world} ranks for the 6 workers .* one of 1, 2, 3, 6"
        ):
            check_world(recipe, world)
    plan = make_plan(recipe, 1078)
    # 2 epochs are 2,156 samples, six steps of 384; from then on a step is a round of 8 updates.
    batches = [plan.timeline.batch(step) for step in range(8)]
    assert batches == [384] * 6 + [384 * 8] * 2
    assert recipe.batch_norm_power(384) == 1
    assert recipe.batch_norm_power(384 * 8) == 8
