"""Losses against their formulas in float64, on soft targets as mixup makes them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from bigbatch.configs.losses import Loss
from bigbatch.trainers.losses.build import build_loss

ADAPTER: TypeAdapter[Any] = TypeAdapter(Loss)
CLASSES = 7
# A recipe's loss, and its value for each sample from probabilities and targets, both [B, C].
CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "cross-entropy": (
        {"name": "cross_entropy"},
        lambda p, t: -(t * p.log()).sum(1),
    ),
    "label smoothing (Szegedy et al. 2016, section 7)": (
        {"name": "cross_entropy", "label_smoothing": 0.1},
        lambda p, t: -((0.9 * t + 0.1 / CLASSES) * p.log()).sum(1),
    ),
    "poly-1 (Leng et al. 2022, equation 6)": (
        {"name": "poly1", "epsilon": 2.0},
        lambda p, t: -(t * p.log()).sum(1) + 2.0 * (1 - (t * p).sum(1)),
    ),
}


def batch() -> tuple[Tensor, Tensor]:
    """Logits [B, C] of which some are far apart, and targets [B, C]: hard, mixed and even."""
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(32, CLASSES, generator=generator, dtype=torch.float64)
    hard = torch.eye(CLASSES, dtype=torch.float64)[torch.arange(32) % CLASSES]
    share = torch.linspace(0, 1, 32, dtype=torch.float64)[:, None]
    targets = share * hard + (1 - share) * hard.roll(1, 0)
    targets[-1] = 1 / CLASSES
    return logits.requires_grad_(), targets


def test_every_name_in_the_schema_is_tested_here() -> None:
    schema = ADAPTER.json_schema()
    forms = list(schema.get("$defs", {}).values()) or [schema]
    names = [form["properties"]["name"] for form in forms]
    expected = {name for form in names for name in form.get("enum") or [form["const"]]}
    assert {config["name"] for config, _ in CASES.values()} == expected


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_the_formula(case: str) -> None:
    config, formula = CASES[case]
    logits, targets = batch()
    loss = build_loss(ADAPTER.validate_python(config))(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = formula(logits.softmax(1), targets).mean()
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


def test_the_default_is_plain_cross_entropy() -> None:
    logits, targets = batch()
    plain = build_loss(ADAPTER.validate_python({}))(logits, targets)
    assert torch.equal(plain, torch.nn.functional.cross_entropy(logits, targets))
