"""Schedules against torch's where torch has the same one, and against their formulas."""

import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch.optim import lr_scheduler as peer

from bigbatch.configs.errors import UserError
from bigbatch.configs.schedules import Schedule
from bigbatch.trainers.planning.schedules import build_schedule, cycle_ends

TOTAL = 60
ADAPTER: TypeAdapter[Any] = TypeAdapter(Schedule)


def make(name, total=TOTAL, global_batch=10, epoch_samples=100, **options):
    config = ADAPTER.validate_python({"name": name, **options})
    return build_schedule(config, total, global_batch, epoch_samples)


def values(schedule, total=TOTAL):
    return [schedule(t) for t in range(total)]


def torch_values(build, total=TOTAL):
    """The rates that torch's scheduler gives to the steps 0, 1, ... of a run at lr 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build(optimizer)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


SAME = {
    "constant": (
        {"name": "constant"},
        lambda o: peer.ConstantLR(o, factor=1.0),
    ),
    "linear warmup": (
        {"name": "constant", "warmup": "7 steps", "warmup_start": 0.25},
        lambda o: peer.LinearLR(o, start_factor=0.25, total_iters=7),
    ),
    "cosine": (
        {"name": "cosine", "final": 0.1},
        lambda o: peer.CosineAnnealingLR(o, T_max=TOTAL, eta_min=0.1),
    ),
    "warmup, then cosine": (
        {"name": "cosine", "warmup": "10 steps", "warmup_start": 0.1},
        lambda o: peer.SequentialLR(
            o,
            [
                peer.LinearLR(o, start_factor=0.1, total_iters=10),
                peer.CosineAnnealingLR(o, T_max=TOTAL - 10),
            ],
            milestones=[10],
        ),
    ),
    "cycles": (
        {"name": "cycles", "cycles": 4, "final": 0.05},
        lambda o: peer.CosineAnnealingWarmRestarts(o, T_0=TOTAL // 4, eta_min=0.05),
    ),
    "cycles that double": (
        {"name": "cycles", "cycles": 4, "mult": 2},
        lambda o: peer.CosineAnnealingWarmRestarts(o, T_0=4, T_mult=2),  # 4 (1 + 2 + 4 + 8) = 60
    ),
    "polynomial": (
        {"name": "polynomial", "power": 2.0},
        lambda o: peer.PolynomialLR(o, total_iters=TOTAL, power=2.0),
    ),
    "polynomial over a length": (
        {"name": "polynomial", "power": 0.9, "length": "20 steps"},
        lambda o: peer.PolynomialLR(o, total_iters=20, power=0.9),
    ),
    "exponential": (
        {"name": "exponential", "rate": 0.95, "every": "1 steps"},
        lambda o: peer.ExponentialLR(o, gamma=0.95),
    ),
    "step": (
        {"name": "step", "every": "2 epochs", "gamma": 0.1},
        lambda o: peer.StepLR(o, step_size=20, gamma=0.1),
    ),
    "multi_step": (
        {"name": "multi_step", "milestones": ["1 epochs", "35 steps", "400 samples"]},
        lambda o: peer.MultiStepLR(o, milestones=[10, 35, 40], gamma=0.1),
    ),
    "triangular": (
        {"name": "triangular", "rise": "8 steps", "low": 0.2},
        lambda o: peer.CyclicLR(o, base_lr=0.2, max_lr=1.0, step_size_up=8, cycle_momentum=False),
    ),
    "triangular2": (
        {"name": "triangular", "rise": "8 steps", "low": 0.2, "halving": True},
        lambda o: peer.CyclicLR(
            o, base_lr=0.2, max_lr=1.0, step_size_up=8, mode="triangular2", cycle_momentum=False
        ),
    ),
    "one_cycle": (
        {"name": "one_cycle"},
        lambda o: peer.OneCycleLR(o, max_lr=1.0, total_steps=TOTAL + 1, cycle_momentum=False),
    ),
    "one_cycle, linear": (
        {"name": "one_cycle", "shape": "linear", "rise": 0.4, "start": 0.1, "final": 0.001},
        lambda o: peer.OneCycleLR(
            o,
            max_lr=1.0,
            total_steps=TOTAL + 1,
            pct_start=0.4,
            anneal_strategy="linear",
            div_factor=10,
            final_div_factor=100,
            cycle_momentum=False,
        ),
    ),
    "sequence": (
        {
            "name": "sequence",
            "pieces": [
                {"length": "20 steps", "schedule": {"name": "cosine", "final": 0.2}},
                {"length": "2 epochs", "schedule": {"name": "constant"}},
                {"schedule": {"name": "polynomial", "power": 1.0}},
            ],
        },
        lambda o: peer.SequentialLR(
            o,
            [
                peer.CosineAnnealingLR(o, T_max=20, eta_min=0.2),
                peer.ConstantLR(o, factor=1.0),
                peer.PolynomialLR(o, total_iters=20, power=1.0),
            ],
            milestones=[20, 40],
        ),
    ),
    "product": (
        {
            "name": "product",
            "factors": [
                {"name": "constant", "warmup": "5 steps", "warmup_start": 0.5},
                {"name": "exponential", "rate": 0.9, "every": "1 steps"},
            ],
        },
        lambda o: peer.ChainedScheduler(
            [
                peer.LinearLR(o, start_factor=0.5, total_iters=5),
                peer.ExponentialLR(o, gamma=0.9),
            ],
            optimizer=o,
        ),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_equals_torch(case):
    config, build = SAME[case]
    # Torch's OneCycleLR counts its total from the first rate to the last, ours the steps.
    total = TOTAL + 1 if case.startswith("one_cycle") else TOTAL
    assert values(make(**config, total=total)) == pytest.approx(torch_values(build), abs=1e-9)


def test_exponential_warmup_multiplies_by_a_constant():
    schedule = make("constant", warmup="8 steps", warmup_start=0.01, warmup_shape="exponential")
    found = values(schedule, 9)
    assert found[0] == pytest.approx(0.01)
    assert found[8] == 1.0
    ratios = [b / a for a, b in pairwise(found)]
    assert ratios == pytest.approx([100 ** (1 / 8)] * 8)


@pytest.mark.parametrize(
    ("config", "formula"),
    [
        (
            {"name": "natural_exponential", "rate": 0.5, "every": "10 steps"},
            lambda t: math.exp(-0.5 * t / 10),
        ),
        (
            {"name": "inverse_time", "rate": 0.5, "every": "10 steps"},
            lambda t: 1 / (1 + 0.5 * t / 10),
        ),
        (
            {"name": "inverse_time", "rate": 0.5, "every": "10 steps", "staircase": True},
            lambda t: 1 / (1 + 0.5 * (t // 10)),
        ),
        (
            {"name": "exponential", "rate": 0.5, "every": "10 steps"},
            lambda t: 0.5 ** (t / 10),
        ),
        (
            {"name": "linear_cosine", "periods": 2, "alpha": 0.1, "beta": 0.2},
            lambda t: (
                (0.1 + (TOTAL - t) / TOTAL) * (1 + math.cos(4 * math.pi * t / TOTAL)) / 2 + 0.2
            ),
        ),
        (
            {"name": "polynomial", "power": 2, "final": 0.1, "length": "20 steps", "cycle": True},
            lambda t: 0.1 + 0.9 * (1 - t / (20 * max(1, math.ceil(t / 20)))) ** 2,
        ),
        (
            {
                "name": "piecewise_constant",
                "boundaries": ["5 steps", "20 steps"],
                "values": [1, 2, 0.5],
            },
            lambda t: 1 if t < 5 else 2 if t < 20 else 0.5,
        ),
    ],
    ids=lambda x: x["name"] if isinstance(x, dict) else "",
)
def test_follows_its_formula(config, formula):
    assert values(make(**config)) == pytest.approx([formula(t) for t in range(TOTAL)])


def test_cycles_follow_huang_et_al_equation_2():
    """alpha(t) = alpha0 / 2 (cos(pi mod(t - 1, ceil(T/M)) / ceil(T/M)) + 1), t from 1."""
    cycle = math.ceil(TOTAL / 3)
    expected = [0.5 * (math.cos(math.pi * ((t - 1) % cycle) / cycle) + 1) for t in range(1, 61)]
    assert values(make("cycles", cycles=3)) == pytest.approx(expected)


def test_each_cycle_warms_up_again():
    schedule = make(
        "cycles", cycles=3, warmup="5 steps", rewarmup="2 steps", warmup_start=0.1, final=0.01
    )
    for start, warmup in ((0, 5), (20, 2), (40, 2)):
        assert schedule(start) == pytest.approx(0.1)
        assert schedule(start + warmup) == 1.0
        assert schedule(start + 19) < 0.05


def test_warmup_comes_before_the_decay():
    plain = make("cosine", total=50)
    warmed = make("cosine", total=60, warmup="1 epochs")
    assert [warmed(10 + t) for t in range(50)] == pytest.approx(values(plain, 50))


def test_milestones_count_from_the_start_of_the_run():
    """Goyal et al. 2017: warm up for 5 epochs, divide by 10 at epochs 30, 60 and 80."""
    schedule = make(
        "multi_step",
        total=900,
        warmup="5 epochs",
        milestones=["30 epochs", "60 epochs", "80 epochs"],
    )
    assert [schedule(t) for t in (0, 25, 50, 299)] == [0.0, 0.5, 1.0, 1.0]
    assert [schedule(t) for t in (300, 600, 800)] == pytest.approx([0.1, 0.01, 0.001])


def test_noise_is_a_function_of_seed_and_step():
    noisy = {"name": "linear_cosine", "noise": 0.2, "noise_decay": 0.5}
    a, b = make(**noisy), make(**noisy)
    assert [a(t) for t in reversed(range(TOTAL))] == values(b)[::-1]
    assert values(a) != values(make(**noisy, seed=1))
    assert min(values(make(**noisy | {"noise": 50.0}))) == 0.0
    plain = make("linear_cosine", total=20_000)
    steady = make("linear_cosine", total=20_000, noise=0.2, noise_decay=0.0)
    early = [(steady(t) - plain(t)) for t in range(2000)]  # the cosine is 1 to 0.6 % here
    assert sum(early) / 2000 == pytest.approx(0.0, abs=0.03)
    assert sum(x * x for x in early) / 2000 == pytest.approx(0.2, rel=0.1)


def test_a_schedule_counts_steps_of_the_global_batch():
    """A large-batch trap: a scheduler stepped once by each process ends warmup too early.
    Here nothing but the recipe's batch turns epochs into steps."""
    config = ADAPTER.validate_python({"name": "constant", "warmup": "5 epochs"})
    schedule = build_schedule(config, total_steps=2000, global_batch=8192, epoch_samples=1_281_167)
    assert schedule(781) < 1.0
    assert schedule(782) == 1.0  # 5 epochs are 781.96 steps


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 12), st.integers(1, 3))
def test_cycles_cover_the_run(total, cycles, mult):
    config = ADAPTER.validate_python({"name": "cycles", "cycles": cycles, "mult": mult})
    try:
        ends = cycle_ends(config, total)
    except UserError:
        assert total < sum(mult**i for i in range(cycles))
        return
    assert len(ends) == cycles
    assert ends[-1] == total
    lengths = [b - a for a, b in pairwise([0, *ends])]
    unit = total / sum(mult**i for i in range(cycles))
    assert all(abs(n - unit * mult**i) < 1 for i, n in enumerate(lengths))
    schedule = build_schedule(config, total, 1, 1)
    assert all(schedule(start) == 1.0 for start in [0, *ends[:-1]])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(SAME)), st.integers(61, 500), st.integers(0, 10_000))
def test_factors_are_finite_at_every_step_and_after_the_end(case, total, t):
    factor = make(**SAME[case][0], total=total)(t)
    assert math.isfinite(factor)
    assert 0.0 <= factor <= 1.0 + 1e-12


@pytest.mark.parametrize(
    ("total", "options", "said"),
    [
        (10, {"name": "cosine", "warmup": "10 steps"}, "warmup takes 10 steps, but the run has 10"),
        (10, {"name": "cosine", "warmup": "2 epochs"}, "warmup takes 20 steps"),
        (30, {"name": "cycles", "warmup": "1 epochs"}, "cycle 1 has 10"),
        (30, {"name": "cycles", "rewarmup": "12 steps"}, "rewarmup takes 12 steps, but cycle 2"),
        (2, {"name": "cycles"}, "cycles = 3 for a run of 2 steps"),
        (3, {"name": "one_cycle"}, "no step to rise"),
        (30, {"name": "multi_step", "milestones": ["2 epochs", "1 epochs"]}, "20, 10"),
        (
            30,
            {
                "name": "sequence",
                "pieces": [
                    {"length": "30 steps", "schedule": {"name": "constant"}},
                    {"schedule": {"name": "cosine"}},
                ],
            },
            "piece 2 of 2 takes 0 steps",
        ),
        (
            30,
            {
                "name": "sequence",
                "pieces": [
                    {"length": "9 steps", "schedule": {"name": "cosine", "warmup": "1 epochs"}},
                    {"schedule": {"name": "cosine"}},
                ],
            },
            "warmup takes 10 steps, but the run has 9",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_error(total, options, said):
    with pytest.raises(UserError, match=said):
        make(**options, total=total)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "constant", "warmup_shape": "exponential"}, "set warmup_start above 0"),
        ({"name": "polynomial", "cycle": True}, "needs length"),
        ({"name": "piecewise_constant", "boundaries": ["5 steps"], "values": [1]}, "2 pieces"),
        ({"name": "sequence", "pieces": [{"schedule": {"name": "cosine"}}] * 2}, "piece 1 of 2"),
    ],
)
def test_a_contradiction_in_the_recipe_is_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        ADAPTER.validate_python(options)


def test_only_cycles_have_snapshots():
    config = ADAPTER.validate_python({"name": "cosine"})
    assert cycle_ends(config, 100) == []


def test_needs_no_torch():
    code = "import sys, bigbatch.trainers.planning.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
