"""Averages of weights: exact sums, reasons, and the line between two models."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from bigbatch.configs.judged import MAE
from bigbatch.trainers.ensemble.selection import within_margin
from bigbatch.trainers.ensemble.soup import (
    Barrier,
    SoupStep,
    average,
    greedy_soup,
    loss_barrier,
    uniform_soup,
)
from bigbatch.trainers.recovery.tensor_files import save_weights


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model(torch.randn(8, 3))  # statistics, and a batch that is counted
    return model.eval()


def files_of(folder, *models):
    files = {f"member-{i}": folder / f"{i}.safetensors" for i in range(len(models))}
    for model, path in zip(models, files.values(), strict=True):
        save_weights(model, path)
    return files


def bits(model):
    return {k: v.numpy().tobytes() for k, v in model.state_dict().items()}


def mean_of(*models):
    """Averaged in NumPy, of floats and of counters alike."""
    states = [model.state_dict() for model in models]
    means = {k: np.mean([s[k].double().numpy() for s in states], axis=0) for k in states[0]}
    return {k: m.astype(states[0][k].numpy().dtype).tobytes() for k, m in means.items()}


def run_greedy(files, model, scores, losses=None):
    """Greedy soup on one rank, whose evaluations give these (accuracy, nll) in turn."""
    engine = SimpleNamespace(from_main=lambda value: value)
    coming, recomputed = iter(scores), []
    steps = greedy_soup(
        files,
        losses or [1.0] * len(files),
        model,
        engine,
        lambda: dict(zip(("accuracy", "nll"), next(coming), strict=True)),
        lambda: recomputed.append(bits(model)),
    )
    assert next(coming, None) is None
    assert len(recomputed) == len(files) - 1  # for every candidate, none for the first alone
    return steps


def test_greedy_soup_says_why(tmp_path):
    models = [network(seed) for seed in range(4)]
    files, model = files_of(tmp_path, *models), network(9)
    steps = run_greedy(
        files, model, [(0.9, 0.30), (0.8, 0.70), (0.9, 0.20), (0.95, 0.15)], [0.3, 0.4, 0.5, 0.6]
    )
    assert [step.name for step in steps] == list(files)
    assert [(s.kept, s.before, s.after) for s in steps] == [
        (True, 0.9, 0.9),
        (False, 0.9, 0.8),
        (True, 0.9, 0.9),  # it does not fall
        (True, 0.9, 0.95),
    ]
    assert steps[0].barrier is None
    # Half way, half way from the same start, and a third of the way from the soup of two.
    expected = [0.7 - (0.3 + 0.4) / 2, 0.2 - (0.3 + 0.5) / 2, 0.15 - (2 * 0.2 + 0.6) / 3]
    assert [s.barrier for s in steps[1:]] == pytest.approx(expected)
    assert bits(model) == mean_of(models[0], models[2], models[3])


def test_of_errors_the_lower_one_is_better(tmp_path):
    """The same choices by an error as by the accuracy that it is one less."""
    models = [network(seed) for seed in range(4)]
    files, model = files_of(tmp_path, *models), network(9)
    engine = SimpleNamespace(from_main=lambda value: value)
    coming = iter([0.1, 0.2, 0.1, 0.05])
    steps = greedy_soup(
        files,
        [0.1, 0.15, 0.2, 0.3],
        model,
        engine,
        lambda: {"mae": next(coming)},
        lambda: None,
        MAE,
        MAE,
    )
    assert [step.kept for step in steps] == [True, False, True, True]
    expected = [0.2 - (0.1 + 0.15) / 2, 0.1 - (0.1 + 0.2) / 2, 0.05 - (2 * 0.1 + 0.3) / 3]
    assert [s.barrier for s in steps[1:]] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "margin", "kept"),
    [
        ([2.0, 2.02, 2.1, 1.99], 0.02, [0, 1, 3]),  # a share of the least
        ([2.0, 2.03, float("nan")], 0.0, [0]),
        ([float("nan"), float("inf")], 0.1, [1]),
    ],
)
def test_members_near_the_least_error(scores, margin, kept):
    assert within_margin(scores, margin, MAE) == kept
    assert within_margin([0.9, 0.89, 0.8], 0.02) == [0, 1]


def test_a_greedy_soup_of_one_is_that_model(tmp_path):
    models = [network(seed) for seed in range(3)]
    files, model = files_of(tmp_path, *models), network(9)
    steps = run_greedy(files, model, [(0.9, 0.1), (0.5, 1.0), (0.8, 1.0)])
    assert [step.kept for step in steps] == [True, False, False]
    assert bits(model) == bits(models[0])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_a_soup_of_equal_members_is_itself_bit_for_bit(tmp_path, count):
    files = files_of(tmp_path, *[network()] * count)
    greedy, uniform = network(1), network(2)
    steps = run_greedy(files, greedy, [(0.9, 1.0)] * count)
    assert steps[1:] == [SoupStep(name, True, 0.9, 0.9, 0.0) for name in list(files)[1:]]
    uniform_soup(list(files.values()), uniform, lambda: None)
    assert bits(greedy) == bits(uniform) == bits(network())


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.float32, 5, elements=st.floats(width=32, allow_nan=False)), st.integers(1, 64)
)  # any float32, with its sign of zero, subnormals and infinities
def test_the_mean_of_equal_floats_is_that_float(values, count):
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(5))
    total = torch.from_numpy(values).double()
    for _ in range(count - 1):
        total = total + torch.from_numpy(values)
    average(model, {"weight": total}, count)
    assert model.weight.detach().numpy().tobytes() == values.tobytes()


def test_a_uniform_soup_is_the_mean_and_recomputes_once(tmp_path):
    models, calls = [network(seed) for seed in range(3)], []
    model = network(9)
    files = files_of(tmp_path, *models)
    uniform_soup(list(files.values()), model, lambda: calls.append(bits(model)))
    assert calls == [mean_of(*models)] == [bits(model)]
    shuffled = network(8)
    uniform_soup(list(files.values())[::-1], shuffled, lambda: None)
    assert bits(shuffled) == bits(model)


def test_integer_buffers_are_rounded_down(tmp_path):
    few, many = network(), network()
    many[1].num_batches_tracked.fill_(4)
    soup = network()
    uniform_soup(list(files_of(tmp_path, few, many).values()), soup, lambda: None)
    assert soup[1].num_batches_tracked == 2  # of 1 and 4
    assert soup[1].num_batches_tracked.dtype == torch.int64


def at(value):
    return {"w": torch.tensor([value])}


def test_the_barrier_of_a_double_well_is_its_ridge():
    found = loss_barrier(at(-1.0), at(1.0), lambda s: float((s["w"] ** 2 - 1) ** 2))
    assert len(found.losses) == 11
    assert found.losses == pytest.approx(((np.linspace(-1, 1, 11) ** 2 - 1) ** 2).tolist())
    assert found.height == pytest.approx(1.0)


def test_a_convex_loss_has_no_barrier():
    """Nor one whose ends differ: what counts is what is above the line between them."""
    assert loss_barrier(at(-1.0), at(3.0), lambda s: float(s["w"] ** 2)).height == 0
    assert Barrier((1.0, 2.0, 3.0)).height == 0
    assert Barrier((1.0, 2.5, 3.0)).height == 0.5
    assert Barrier((3.0, 2.5, 1.0)).height == 0.5


def test_the_ends_of_the_line_are_the_models_and_its_points_between_them():
    first, second, seen = network(0), network(1), []
    loss_barrier(first.state_dict(), second.state_dict(), lambda s: seen.append(s) or 0.0, points=3)
    assert len(seen) == 3
    for end, model in ((seen[0], first), (seen[2], second)):
        assert {k: v.numpy().tobytes() for k, v in end.items()} == bits(model)
    middle = {k: v.numpy().tobytes() for k, v in seen[1].items()}
    assert middle == mean_of(first, second)
    assert {k: v.dtype for k, v in seen[1].items()} == {
        k: v.dtype for k, v in first.state_dict().items()
    }


def test_no_line_joins_two_architectures():
    with pytest.raises(ValueError, match=r"w differs"):
        loss_barrier(at(1.0), {"w": torch.zeros(2)}, lambda s: 0.0)
    with pytest.raises(ValueError, match=r"v differs"):
        loss_barrier(at(1.0), {**at(1.0), "v": torch.zeros(1)}, lambda s: 0.0)
    with pytest.raises(ValueError, match="2 points"):
        loss_barrier(at(1.0), at(2.0), lambda s: 0.0, points=2)
