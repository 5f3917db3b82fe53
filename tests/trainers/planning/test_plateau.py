"""Reduction on a plateau: torch's rates, and the same ones when the history is replayed."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bigbatch.configs import schedules as c
from bigbatch.trainers.planning.plateau import Evaluation, read_evaluations
from bigbatch.trainers.planning.schedules import build_schedule

EVERY = 5  # steps between evaluations


def torchs(values, **options):
    """The rate after each value, by torch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, **options)
    rates = []
    for value in values:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def evaluations(values, metric):
    return [Evaluation(EVERY * (i + 1), {metric: v}) for i, v in enumerate(values)]


def build(config, found, total=1000):
    return build_schedule(config, total, 10, 100, evaluations=found)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.floats(0.01, 4.0).map(lambda v: round(v, 2)) | st.just(math.nan), min_size=1, max_size=40
    ),
    st.sampled_from(["nll", "accuracy"]),
    st.sampled_from([0.1, 0.5]),
    st.integers(0, 3),
    st.sampled_from([0.0, 1e-4, 0.3]),
    st.sampled_from(["rel", "abs"]),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.2, 0.001]),
)
def test_equals_torch(values, metric, factor, patience, threshold, mode, cooldown, final):
    config = c.Plateau(
        name="plateau",
        metric=metric,
        factor=factor,
        patience=patience,
        threshold=threshold,
        threshold_mode=mode,
        cooldown=cooldown,
        final=final,
    )
    schedule = build(config, evaluations(values, metric))
    expected = torchs(
        values,
        mode="min" if metric == "nll" else "max",
        factor=factor,
        patience=patience,
        threshold=threshold,
        threshold_mode=mode,
        cooldown=cooldown,
        min_lr=final,
    )
    assert schedule(EVERY - 1) == 1.0
    # The evaluation after s steps acts on step s at the earliest, and on all up to the next.
    for i, rate in enumerate(expected, 1):
        assert [schedule(EVERY * i + k) for k in range(EVERY)] == [rate] * EVERY


PLATEAU = c.Plateau(name="plateau", patience=0, factor=0.5, warmup="10 steps")  # type: ignore[arg-type]
FLAT = evaluations([1.0] * 20, "nll")


def test_the_warmups_evaluations_do_not_count() -> None:
    schedule = build(PLATEAU, FLAT)
    assert [schedule(t) for t in (0, 5, 9)] == [0.0, 0.5, 0.9]
    # Those after 5 and 10 steps came too early; 15 sets the best value, 20 halves.
    assert [schedule(t) for t in (10, 19, 20, 25)] == [1.0, 1.0, 0.5, 0.25]


def test_the_future_does_not_act_on_the_past() -> None:
    now = build(PLATEAU, FLAT[:4])
    later = build(PLATEAU, FLAT)
    assert [now(t) for t in range(25)] == [later(t) for t in range(25)]


def test_inside_a_sequence_and_a_product() -> None:
    constant = c.Constant(name="constant")
    plateau = c.Plateau(name="plateau", patience=0, factor=0.5)
    pieces = [{"length": "32 steps", "schedule": constant}, {"schedule": plateau}]
    config = c.Sequence.model_validate({"name": "sequence", "pieces": pieces})
    schedule = build(config, FLAT)
    assert [schedule(t) for t in (31, 32, 39, 40, 45)] == [1.0, 1.0, 1.0, 0.5, 0.25]
    half = c.Product(name="product", factors=[c.Polynomial(name="polynomial", power=1.0), plateau])
    assert build(half, FLAT)(10) == (1 - 10 / 1000) * 0.5
    assert c.depends_on_evaluations(config)
    assert c.depends_on_evaluations(half)
    assert not c.depends_on_evaluations(constant)


def test_the_list_grows_while_the_schedule_is_in_use() -> None:
    found: list[Evaluation] = []
    schedule = build(c.Plateau(name="plateau", patience=0, factor=0.5), found)
    assert schedule(10) == 1.0
    found += FLAT[:2]
    assert schedule(10) == 0.5


def test_records_are_read_back_as_they_were_measured(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [
        {"kind": "train", "step": 1, "loss": 2.0},
        {"kind": "eval", "step": 1, "split": "val", "accuracy": 1 / 3, "nll": 0.1 + 0.2},
        {"kind": "eval", "step": 1, "split": "test", "accuracy": 0.5, "nll": 1.0},
        {"kind": "eval", "step": 2, "split": "val", "accuracy": 0.5, "nll": None},
        {"kind": "eval", "step": 3, "split": "val", "accuracy": 0.5, "nll": 1.0},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert read_evaluations(path, 2) == [
        Evaluation(1, {"accuracy": 1 / 3, "nll": 0.1 + 0.2}),
        Evaluation(2, {"accuracy": 0.5, "nll": None}),
    ]
    assert read_evaluations(tmp_path / "none", 2) == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"factor": 1.0}, "less than 1"), ({"patience": -1}, "greater"), ({"metric": "ece"}, "nll")],
)
def test_what_a_recipe_may_not_say(wrong, says) -> None:
    with pytest.raises(ValueError, match=says):
        c.Plateau.model_validate({"name": "plateau", **wrong})
