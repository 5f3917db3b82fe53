"""The average of weights, against its definition in float64 and against timm's and torch's."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bigbatch.trainers.optim.averaging import WeightAverage, newest_share

ALL = range(1, 10**9)  # the weights after every step enter
SHAPES = {"scalar": (), "none": (0, 3), "rows": (5, 3), "images": (4, 3, 2, 2)}


def walk(steps: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Weights after each of some steps."""
    generator = torch.Generator().manual_seed(4)
    at = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    path = []
    for _ in range(steps):
        at = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in at.items()}
        path.append({name: w.to(dtype) for name, w in at.items()})
    return path


def follow(
    path: list[dict[str, Tensor]], decay_rate: float, entering: object = ALL
) -> WeightAverage:
    weights = {name: torch.zeros_like(w) for name, w in path[0].items()}
    weights["images"] = weights["images"].to(memory_format=torch.channels_last)
    average = WeightAverage(weights, entering, decay_rate)  # type: ignore[arg-type]
    for step, at in enumerate(path, start=1):
        for name, weight in weights.items():
            weight.copy_(at[name])
        average.update(step)
    return average


def mean_of(path: list[dict[str, Tensor]], decay_rate: float) -> dict[str, Tensor]:
    """The definition: a sum over all weights, the newest of which weighs 1, over its total."""
    parts = [math.exp(-decay_rate * age) for age in reversed(range(len(path)))]
    return {
        name: sum(part * at[name].double() for part, at in zip(parts, path, strict=True))
        / math.fsum(parts)
        for name in SHAPES
    }


@pytest.mark.parametrize("decay_rate", [0.0, 1e-9, 0.01, 0.7, 50.0])
@pytest.mark.parametrize("steps", [1, 2, 60])
def test_it_is_the_weighted_mean_of_its_definition(decay_rate: float, steps: int) -> None:
    path = walk(steps)
    average = follow(path, decay_rate)
    assert average.count == steps
    rounded = average.averaged()
    for name, expected in mean_of(path, decay_rate).items():
        torch.testing.assert_close(average.tensors[name], expected, rtol=1e-13, atol=1e-14)
        assert rounded[name].dtype == torch.float32
        assert torch.equal(rounded[name], average.tensors[name].float())


def test_half_of_it_is_as_new_as_its_half_life() -> None:
    """Weights that change once and stay: half a half-life later they have 29 %, then 50, 75 %."""
    half_life = 40
    rate = math.log(2) / half_life
    for since, expected in ((20, 1 - 0.5**0.5), (40, 0.5), (80, 0.75)):
        path = [{"w": torch.zeros(1)}] * 4000 + [{"w": torch.ones(1)}] * since
        weight = torch.zeros(1)
        average = WeightAverage({"w": weight}, ALL, rate)
        for step, at in enumerate(path, start=1):
            weight.copy_(at["w"])
            average.update(step)
        assert float(average.tensors["w"]) == pytest.approx(expected, abs=1e-12)


def test_weights_before_the_start_have_no_part() -> None:
    path = walk(12)
    for entering in (range(5, 13), (5, 6, 7, 8, 9, 10, 11, 12)):
        average = follow(path, 0.1, entering)
        for name, expected in mean_of(path[4:], 0.1).items():
            torch.testing.assert_close(average.tensors[name], expected)
    chosen = follow(path, 0.0, {3, 6, 9})
    for name, expected in mean_of([path[i - 1] for i in (3, 6, 9)], 0.0).items():
        torch.testing.assert_close(chosen.tensors[name], expected)


def test_there_is_none_before_the_first_update() -> None:
    average = follow(walk(3), 0.1, range(4, 9))
    assert average.count == 0
    with pytest.raises(AssertionError, match="no weights have entered"):
        average.averaged()


def test_torch_s_swa_is_the_plain_mean() -> None:
    model = nn.Linear(3, 2)
    peer = AveragedModel(model)
    average = WeightAverage(dict(model.named_parameters()), ALL, 0.0)
    for step in range(1, 8):
        move(model)
        peer.update_parameters(model)
        average.update(step)
    for name, value in average.averaged().items():
        torch.testing.assert_close(value, peer.module.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_timm_s_ema_is_ours_once_the_start_s_share_is_taken_out() -> None:
    """timm starts from the initial weights, which keep a share of d^n."""
    model, decay, steps = nn.Linear(3, 2), 0.9, 12
    first = copy.deepcopy(model.state_dict())
    peer = ModelEmaV3(model, decay=decay)
    average = WeightAverage(dict(model.named_parameters()), ALL, -math.log(decay))
    for step in range(1, steps + 1):
        move(model)
        peer.update(model)  # told a step, it would take the first weights whole
        average.update(step)
    left = decay**steps
    for name, value in average.averaged().items():
        theirs = (peer.module.state_dict()[name] - left * first[name]) / (1 - left)
        torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def move(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape), alpha=0.1)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=9),
    st.sampled_from([0.0, 1e-6, 0.3, 4.0]),
    st.integers(1, 40),
)
def test_equal_weights_stay_themselves(values: list[float], decay_rate: float, steps: int) -> None:
    weights = {"w": torch.tensor(values, dtype=torch.float32)}
    average = WeightAverage(weights, ALL, decay_rate)
    for step in range(1, steps + 1):
        average.update(step)
    assert torch.equal(average.averaged()["w"], weights["w"])


@given(st.integers(1, 300), st.floats(0, 30) | st.just(0.0))
def test_the_shares_of_all_weights_add_up_to_one(count: int, decay_rate: float) -> None:
    weighed = math.fsum(math.exp(-decay_rate * age) for age in range(count))
    assert newest_share(count, decay_rate) * weighed == pytest.approx(1, rel=1e-12)


def test_a_long_average_still_moves() -> None:
    """float32 loses it: half-lives of a million steps, weights that are off by a thousandth."""
    weight, rate, count = torch.tensor([1.001]), math.log(2) / 1e6, 10**8
    average = WeightAverage({"w": weight}, ALL, rate)
    average.load(count, {"w": torch.ones(1, dtype=torch.float64)})
    plain = torch.ones(1)
    for step in range(1, 101):
        average.update(step)
        plain.lerp_(weight, newest_share(count + step, rate))
    moved = (float(weight) - 1) * -math.expm1(-100 * rate)
    assert float(average.tensors["w"]) - 1 == pytest.approx(moved, rel=1e-8)
    assert float(plain) == 1.0


def test_it_goes_on_from_where_another_stood_bit_for_bit() -> None:
    path = walk(20)
    whole, half = follow(path, 0.05), follow(path[:9], 0.05)
    weights = {name: torch.empty_like(w) for name, w in path[0].items()}
    other = WeightAverage(weights, ALL, 0.05)
    other.load(half.count, {name: value.clone() for name, value in half.tensors.items()})
    for step, at in enumerate(path[9:], start=10):
        for name, weight in weights.items():
            weight.copy_(at[name])
        other.update(step)
    assert other.count == whole.count
    for name, value in whole.tensors.items():
        assert torch.equal(other.tensors[name], value)
    other.load(0, {})
    assert other.count == 0
    assert all(not mean.any() for mean in other.tensors.values())


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {k: v for k, v in t.items() if k != "rows"},
        lambda t: {**t, "more": t["rows"]},
        lambda t: {**t, "rows": t["rows"][:2]},
        lambda t: {**t, "rows": t["rows"].float()},
    ],
)
def test_what_is_no_average_of_these_weights_is_refused(change: object) -> None:
    average = follow(walk(2), 0.1)
    wrong = change({n: v.clone() for n, v in average.tensors.items()})  # type: ignore[operator]
    with pytest.raises(ValueError, match="the average does not fit"):
        average.load(2, wrong)
