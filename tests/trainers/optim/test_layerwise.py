"""What LARS and LAMB have in common."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from bigbatch.trainers.optim import LAMB, LARS, layerwise
from tests.helpers.optim_reference import make_layers, run

pytestmark = pytest.mark.parametrize(
    "optimizer_class", [LARS, partial(LARS, nesterov=True), LAMB], ids=["LARS", "Nesterov", "LAMB"]
)


def test_the_gradient_stays_as_it_was(optimizer_class):
    params, grads = make_layers(torch.float32)
    optimizer = optimizer_class(list(params.values()), lr=1.0, weight_decay=0.01)
    run(optimizer, params, grads[:1], [1.0])
    for name, p in params.items():
        assert torch.equal(p.grad, grads[0][name])


@pytest.mark.parametrize("zero", ["weights", "gradient", "both"])
def test_zero_norms_give_ratio_one_and_finite_weights(optimizer_class, zero):
    p = nn.Parameter(torch.zeros(3, 3) if zero != "gradient" else torch.ones(3, 3))
    p.grad = torch.ones(3, 3) if zero == "weights" else torch.zeros(3, 3)
    optimizer = optimizer_class([p], lr=0.5)
    optimizer.step()
    assert optimizer.last_ratios[0][1].item() == 1.0
    assert torch.isfinite(p).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_gives_the_weights_of_a_plain_one(optimizer_class):
    plain, grads = make_layers(torch.float32, "cuda")
    captured, _ = make_layers(torch.float32, "cuda")
    lr = torch.tensor(0.5, device="cuda")
    optimizer = optimizer_class(list(captured.values()), lr=lr, weight_decay=0.01)
    for name, p in captured.items():
        p.grad = grads[0][name].clone()
    before = {name: p.detach().clone() for name, p in captured.items()}
    optimizer.step()  # makes the state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    with torch.no_grad():
        for name, p in captured.items():
            p.copy_(before[name])
            for value in optimizer.state[p].values():
                value.zero_()
    other = optimizer_class(list(plain.values()), lr=0.5, weight_decay=0.01)
    for row, rate in zip(grads, (0.5, 0.7, 1.0, 0.2, 0.1, 0.0), strict=True):
        lr.fill_(rate)
        for name, p in captured.items():
            p.grad.copy_(row[name])
        graph.replay()
        run(other, plain, [row], [rate])
    for name in plain:
        torch.testing.assert_close(plain[name], captured[name], rtol=1e-5, atol=1e-6)


def test_a_copied_optimizer_goes_on_as_the_original(optimizer_class):
    """torch copies groups and state alone."""
    params, grads = make_layers(torch.float32)
    optimizer = optimizer_class(list(params.values()), lr=1.0, weight_decay=0.01)
    run(optimizer, params, grads[:1], [1.0])
    copied_params, copied = copy.deepcopy((params, optimizer))
    run(optimizer, params, grads[1:2], [1.0])
    run(copied, copied_params, grads[1:2], [1.0])
    for name, p in params.items():
        assert torch.equal(p, copied_params[name])


def test_layers_may_lie_on_several_devices(optimizer_class, monkeypatch):
    monkeypatch.setattr(layerwise, "on_cpu", lambda tensors: False)  # a GPU's path
    params = [nn.Parameter(torch.ones(3, device=device)) for device in ("cpu", "meta")]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = optimizer_class(params, lr=0.5)
    optimizer.step()
    assert [ratios.device.type for _, ratios in optimizer.last_ratios] == ["cpu", "meta"]
    assert (params[0] < 1).all()
