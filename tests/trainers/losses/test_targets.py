"""Losses of numbers and of distributions against their formulas and torch, in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor, nn

from bigbatch.configs.losses import Loss
from bigbatch.trainers.losses.build import LossFunction, build_loss, build_objective
from bigbatch.trainers.losses.targets import robust_deviation

ADAPTER: TypeAdapter[Any] = TypeAdapter(Loss)
Array = NDArray[np.float64]


def built(config: dict[str, Any]) -> LossFunction:
    return build_loss(ADAPTER.validate_python(config))


def biweight(r: float, c: float = 4.685) -> float:
    """Tukey's, of an error in units of its scale."""
    return c**2 / 6 * (1 - (1 - (r / c) ** 2) ** 3) if abs(r) <= c else c**2 / 6


def mad(errors: Array) -> Array:
    return 1.4826 * np.median(np.abs(errors - np.median(errors, 0)), 0)


def tukey(y: Array, t: Array) -> float:
    return float(np.mean([[biweight(x) for x in row] for row in (y - t) / mad(y - t)]))


CASES: dict[str, tuple[dict[str, Any], Callable[[Array, Array], float]]] = {
    "l1": ({}, lambda y, t: float(np.abs(y - t).mean())),
    "l2": ({}, lambda y, t: float(((y - t) ** 2).mean())),
    "smooth_l1": (
        {"beta": 0.5},
        lambda y, t: float(
            np.mean([d * d if d < 0.5 else d - 0.25 for d in np.abs(y - t).ravel().tolist()])
        ),
    ),
    "tukey": ({}, tukey),
    "kl": (
        {},
        lambda y, t: float(
            np.mean(
                [
                    sum(q * np.log(q / p) for q, p in zip(s, p, strict=True) if q)
                    for p, s in zip(np.exp(y) / np.exp(y).sum(1, keepdims=True), t, strict=True)
                ]
            )
        ),
    ),
}


def batch(name: str, count: int = 16, width: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    outputs = torch.randn(count, width, generator=generator, dtype=torch.float64)
    targets = torch.randn(count, width, generator=generator, dtype=torch.float64)
    targets[0] += 40  # an outlier
    if name == "kl":
        targets = targets.softmax(1)
        targets[1] = torch.eye(width, dtype=torch.float64)[0]
    return outputs.requires_grad_(), targets


@pytest.mark.parametrize("name", CASES)
def test_value_is_that_of_the_formula(name: str) -> None:
    keys, formula = CASES[name]
    outputs, targets = batch(name)
    loss = built({"name": name, **keys})(outputs, targets)
    expected = formula(outputs.detach().numpy(), targets.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_slopes(name: str) -> None:
    """Of Tukey's with a scale that does not move, as its gradient has it."""
    keys = CASES[name][0] | ({"scale": 0.8} if name == "tukey" else {})
    loss = built({"name": name, **keys})
    outputs, targets = batch(name)
    assert torch.autograd.gradcheck(lambda y: loss(y, targets), outputs)
    far = (1000 * outputs.detach()).float().requires_grad_()
    loss(far, targets.float()).backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()


def test_torch_agrees() -> None:
    outputs, targets = batch("l1")
    pairs = {
        "l1": F.l1_loss(outputs, targets),
        "l2": F.mse_loss(outputs, targets),
        "smooth_l1": F.smooth_l1_loss(outputs, targets, beta=1.0),
    }
    for name, expected in pairs.items():
        torch.testing.assert_close(built({"name": name})(outputs, targets), expected)
    logits, shares = batch("kl")
    expected = F.kl_div(logits.log_softmax(1), shares, reduction="batchmean")
    torch.testing.assert_close(built({"name": "kl"})(logits, shares), expected)


def test_an_outlier_pulls_no_more_and_the_scale_is_no_part_of_the_gradient() -> None:
    outputs, targets = batch("tukey")
    built({"name": "tukey"})(outputs, targets).backward()
    assert outputs.grad is not None
    assert (outputs.grad[0] == 0).all()
    errors = (outputs - targets).detach().numpy()
    r = errors / mad(errors)
    inside = np.abs(r) <= 4.685
    slope = np.where(inside, r * (1 - (r / 4.685) ** 2) ** 2, 0) / mad(errors) / errors.size
    np.testing.assert_allclose(outputs.grad.numpy(), slope, rtol=1e-10, atol=1e-16)


def test_a_batch_without_spread_has_a_scale_all_the_same() -> None:
    assert robust_deviation(torch.zeros(8, 2)).tolist() == pytest.approx([1e-3, 1e-3])
    outputs = torch.zeros(8, 1, requires_grad=True)
    built({"name": "tukey"})(outputs, torch.zeros(8, 1)).backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_lifted_first(name: str) -> None:
    outputs, targets = batch(name)
    half = outputs.detach().to(torch.bfloat16)
    loss = built({"name": name, **CASES[name][0]})
    assert torch.equal(loss(half, targets.float()), loss(half.float(), targets.float()))


@pytest.mark.parametrize("name", CASES)
def test_each_loss_learns(name: str) -> None:
    """A linear model of what a linear model made, or shares of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=generator)
    true = x @ torch.randn(6, 3, generator=generator)
    targets = true.softmax(1) if name == "kl" else (true - true.mean(0)) / true.std(0)
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    objective = build_objective(ADAPTER.validate_python({"name": name}), model)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    first = objective(model, x, targets).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = objective(model, x, targets)
        loss.backward()
        optimizer.step()
    if name == "tukey":  # in units of errors, which fall: the last ones of 0.8 at the start
        first, loss = 2.0, (model(x) - targets).abs().mean()
    assert loss.item() < 0.1 * first
