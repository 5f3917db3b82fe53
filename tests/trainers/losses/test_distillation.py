"""What a student learns from its teacher, against formulas in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from bigbatch.configs.distill import Distill
from bigbatch.configs.losses import CrossEntropy
from bigbatch.trainers.losses.build import build_loss, build_student_objective

ADAPTER: TypeAdapter[Any] = TypeAdapter(Distill)
ROWS, CLASSES = 9, 5


def distill(**keys: Any) -> Any:
    return ADAPTER.validate_python({"teacher": "runs/teacher", **keys})


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels as mixup makes them, and a teacher's log-probabilities: each [B, C]."""
    generator = torch.Generator().manual_seed(1)
    logits, theirs = 4 * torch.randn(2, ROWS, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.rand(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), labels / labels.sum(1, keepdim=True), theirs.log_softmax(1)


def loss_of(config: Any, logits: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
    objective = build_student_objective(CrossEntropy(), config, nn.Identity())
    return objective(nn.Identity(), logits, torch.cat([labels, taught], 1))


def soft(logits: np.ndarray, taught: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    """T^2 / B sum p (log p - log q), and its gradient T (q - p) / B."""
    q = np.exp(logits / temperature)
    p = np.exp(taught / temperature)
    q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
    value = temperature**2 * (p * (np.log(p) - np.log(q))).sum() / len(p)
    return value, temperature * (q - p) / len(p)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_targets_are_hintons(temperature: float) -> None:
    logits, labels, taught = batch()
    loss = loss_of(distill(temperature=temperature, weight=1), logits, labels, taught)
    (gradient,) = torch.autograd.grad(loss, logits)
    value, expected = soft(logits.detach().numpy(), taught.numpy(), temperature)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-10, atol=1e-15)


def test_logit_regression_is_of_centred_logits() -> None:
    logits, labels, taught = batch()
    loss = loss_of(distill(name="logits", weight=1), logits, labels, taught)
    (gradient,) = torch.autograd.grad(loss, logits)
    ours, theirs = logits.detach().numpy(), taught.numpy()
    difference = ours - ours.mean(1, keepdims=True) - theirs + theirs.mean(1, keepdims=True)
    assert loss.item() == pytest.approx((difference**2).mean(), rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), 2 * difference / difference.size, atol=1e-14)


@pytest.mark.parametrize("name", ["soft", "logits"])
def test_hard_and_soft_parts_add_up_by_their_weights(name: str) -> None:
    logits, labels, taught = batch()
    plain = build_loss(CrossEntropy())(logits, labels)
    only = loss_of(distill(name=name, weight=1), logits, labels, taught)
    both = loss_of(distill(name=name, weight=0.3), logits, labels, taught)
    none = loss_of(distill(name=name, weight=0), logits, labels, taught)
    assert both.item() == pytest.approx((0.7 * plain + 0.3 * only).item(), rel=1e-14)
    assert torch.equal(none, plain)
    (ours,), (expected,) = (torch.autograd.grad(x, logits) for x in (none, plain))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("config", [distill(weight=1), distill(name="logits", weight=1)])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(config: Any) -> None:
    logits, labels, _ = batch()
    shifted = logits.detach() + torch.arange(ROWS, dtype=torch.float64)[:, None]
    loss = loss_of(config, logits, labels, shifted)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item()) < 1e-14
    assert gradient.abs().max() < 1e-14


def test_at_high_temperature_soft_targets_become_logit_regression() -> None:
    """Hinton et al. 2015, equation 4: (z - v) / (B C) as T grows, for centred logits."""
    logits, labels, taught = batch()
    (hot,) = torch.autograd.grad(
        loss_of(distill(temperature=1e5, weight=1), logits, labels, taught), logits
    )
    (regression,) = torch.autograd.grad(
        loss_of(distill(name="logits", weight=1), logits, labels, taught), logits
    )
    torch.testing.assert_close(hot, regression / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["soft", "logits"])
def test_a_class_that_the_teacher_rules_out_leaves_the_gradient_finite(name: str) -> None:
    logits = (100 * torch.randn(4, CLASSES)).requires_grad_()
    taught = torch.full((4, CLASSES), float(np.log(np.finfo(np.float64).tiny)))
    taught[:, 0] = 0
    loss = loss_of(distill(name=name, temperature=1) if name == "soft" else distill(name=name),
                   logits, torch.eye(CLASSES)[:4], taught)  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
