"""Penalties in the loss, against sums in float64."""

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.configs.losses import CrossEntropy
from bigbatch.trainers.losses.build import build_objective
from bigbatch.trainers.losses.penalty import penalised


def test_the_elastic_net_is_over_the_weights_that_decay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    x, targets = torch.randn(8, 4).double(), torch.eye(3).double()[torch.arange(8) % 3]
    plain = F.cross_entropy(model(x), targets)
    objective = penalised(build_objective(CrossEntropy()), model, l1=0.3, l2=0.2)
    loss = objective(model, x, targets)
    weights = [w for layer in (0, 2) for w in model[layer].weight.flatten().tolist()]
    expected = plain.item() + sum(0.3 * abs(w) + 0.1 * w * w for w in weights)
    assert abs(loss.item() - expected) < 1e-12
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain.backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        more = 0.3 * parameter.sign() + 0.2 * parameter if parameter.ndim == 2 else 0
        torch.testing.assert_close(gradient, parameter.grad + more)
