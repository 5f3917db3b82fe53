"""LAMB against NumPy in float64, against its peers, and each known trap."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import timm.optim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigbatch.trainers.optim import LAMB

from .optim_reference import (
    PATHS,
    RATES,
    ReferenceLAMB,
    as_array,
    make_layers,
    run,
    run_reference,
    take,
)

VARIANTS: list[dict[str, Any]] = [
    {"weight_decay": decay, "bias_correction": correction, "trust_bounds": bounds, "betas": betas}
    for decay, correction, bounds, betas in product(
        (0.0, 0.05), (True, False), (None, (0.1, 0.4)), ((0.9, 0.999), (0.5, 0.9))
    )
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_each_variant_follows_the_formula_in_float64(options, path, monkeypatch):
    device = take(path, monkeypatch)
    params, grads = make_layers(torch.float64, device)
    adapted = {name: name != "vector" for name in params}
    groups = [{"params": [p], "adapt": adapted[name]} for name, p in params.items()]
    optimizer = LAMB(groups, lr=1.0, **options)
    references = {
        name: ReferenceLAMB(as_array(p), adapt=adapted[name], **options)
        for name, p in params.items()
    }
    run(optimizer, params, grads, RATES)
    run_reference(references, grads, RATES)
    for name, p in params.items():
        reference, state = references[name], optimizer.state[p]
        np.testing.assert_allclose(as_array(p), reference.w, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(as_array(state["exp_avg"]), reference.m, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(
            as_array(state["exp_avg_sq"]), reference.v, rtol=1e-11, atol=1e-16
        )
        assert state["step"].item() == len(RATES)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_float32_state_and_norms(dtype, path, monkeypatch):
    params, grads = make_layers(dtype, take(path, monkeypatch))
    optimizer = LAMB(list(params.values()), lr=1.0, weight_decay=0.01)
    for step, (row, lr) in enumerate(zip(grads[1:], RATES[1:], strict=True)):
        expected = {}
        for name, p in params.items():
            reference = ReferenceLAMB(as_array(p), weight_decay=0.01)
            if p in optimizer.state:
                state = optimizer.state[p]
                reference.m, reference.v = as_array(state["exp_avg"]), as_array(state["exp_avg_sq"])
                reference.t = step
            reference.step(as_array(row[name]), lr)
            expected[name] = torch.from_numpy(reference.w).to(p.device, dtype)
        run(optimizer, params, [row], [lr])
        for name, p in params.items():
            assert optimizer.state[p]["exp_avg"].dtype == torch.float32
            torch.testing.assert_close(
                p.data, expected[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-7
            )
            assert (p.data == expected[name]).float().mean() > 0.95


@pytest.mark.parametrize("correction", [True, False])
def test_equals_timm(correction):
    ours, grads = make_layers(torch.float64)
    theirs, _ = make_layers(torch.float64)
    # max_grad_norm and always_adapt: timm clips the global norm to 1 and leaves layers
    # without decay unadapted, unless told otherwise.
    options = {"weight_decay": 0.02, "bias_correction": correction}
    peer = timm.optim.Lamb(
        list(theirs.values()), lr=1.0, max_grad_norm=None, always_adapt=True, **options
    )
    optimizer = LAMB(list(ours.values()), lr=1.0, **options)
    run(optimizer, ours, grads, RATES)
    run(peer, theirs, grads, RATES)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-13)


def test_equals_pytorch_optimizer_for_small_weights_without_bias_correction():
    ours, grads = make_layers(torch.float64)
    theirs, _ = make_layers(torch.float64)
    options = {"weight_decay": 0.02, "eps": 1e-12}  # theirs adds eps to |u| as well
    # adam_debias: otherwise theirs divides the rate by 1 - beta1^t, after the trust ratio.
    peer = pytorch_optimizer.Lamb(
        list(theirs.values()), lr=1.0, weight_decouple=False, adam_debias=True, **options
    )
    optimizer = LAMB(list(ours.values()), lr=1.0, bias_correction=False, **options)
    rates = [0.01 * lr for lr in RATES]
    run(optimizer, ours, grads, rates)
    run(peer, theirs, grads, rates)
    assert all(torch.linalg.vector_norm(p) < 10 for p in ours.values())  # theirs clamps |w| there
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-9)


def test_unadapted_is_torch_adamw():
    ours, grads = make_layers(torch.float64)
    theirs, _ = make_layers(torch.float64)
    groups = [{"params": list(ours.values()), "adapt": False}]
    optimizer = LAMB(groups, lr=1.0, weight_decay=0.02, eps=1e-8)
    peer = torch.optim.AdamW(list(theirs.values()), lr=1.0, weight_decay=0.02, eps=1e-8)
    run(optimizer, ours, grads, RATES)
    run(peer, theirs, grads, RATES)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(3,), (1, 1), (5, 4), (2, 3, 3, 3)]),
    lr=st.floats(1e-3, 1),
    decay=st.floats(0, 0.1),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_the_length_of_a_step_is_lr_times_the_length_of_the_weights(shape, lr, decay, scale, seed):
    """Whatever the gradients' scale: what LAMB promises of every layer."""
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    p.grad = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    before = p.detach().clone()
    LAMB([p], lr=lr, weight_decay=decay).step()
    moved = torch.linalg.vector_norm(p.detach() - before)
    torch.testing.assert_close(moved, lr * torch.linalg.vector_norm(before), rtol=1e-9, atol=0)


@pytest.mark.parametrize("zero", ["weights", "gradient", "both"])
def test_zero_norms_give_ratio_one_and_finite_weights(zero):
    p = nn.Parameter(torch.zeros(3, 3) if zero != "gradient" else torch.ones(3, 3))
    p.grad = torch.ones(3, 3) if zero == "weights" else torch.zeros(3, 3)
    optimizer = LAMB([p], lr=0.5)
    optimizer.step()
    assert optimizer.last_ratios[0][1].item() == 1.0
    assert torch.isfinite(p).all()


def test_layers_without_decay_are_adapted_too():
    """timm skips the trust ratio where weight decay is 0."""
    p = nn.Parameter(torch.full((4, 4), 0.5))
    p.grad = torch.full_like(p, 100.0)
    optimizer = LAMB([p], lr=1e-3, weight_decay=0.0)
    optimizer.step()
    assert optimizer.last_ratios[0][1].item() == pytest.approx(0.5)


def test_bounds_hold_and_a_zero_layer_is_outside_them():
    params, grads = make_layers(torch.float64)
    optimizer = LAMB(list(params.values()), lr=1e-3, trust_bounds=(0.2, 0.3))
    run(optimizer, params, grads[:1], [1e-3])
    ratios = dict(zip(params, torch.cat([r for _, r in optimizer.last_ratios]), strict=True))
    assert ratios.pop("zeros") == 1.0
    assert all(0.2 <= r <= 0.3 for r in ratios.values())


def test_the_gradient_stays_as_it_was():
    params, grads = make_layers(torch.float32)
    optimizer = LAMB(list(params.values()), lr=1.0, weight_decay=0.01)
    run(optimizer, params, grads[:1], [1.0])
    for name, p in params.items():
        assert torch.equal(p.grad, grads[0][name])


def test_a_step_on_a_device_reads_nothing_back():
    """On meta tensors, which have no values, any read-back raises; also with lr as a tensor."""
    for correction, bounds in product((True, False), (None, (0.0, 10.0))):
        p = nn.Parameter(torch.empty(4, 4, device="meta"))
        p.grad = torch.empty(4, 4, device="meta")
        lr = torch.empty((), device="meta")
        optimizer = LAMB([p], lr=lr, bias_correction=correction, trust_bounds=bounds)
        optimizer.step()
        assert optimizer.state[p]["step"].device.type == "meta"


def test_dtypes_may_be_mixed():
    a = nn.Parameter(torch.ones(3, 3))
    b = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
    c = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    LAMB([a, b, c], lr=0.125).step()
    for p in (a, b, c):
        torch.testing.assert_close(p.detach().double(), torch.full((3, 3), 0.875).double())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_gives_the_weights_of_a_plain_one():
    plain, grads = make_layers(torch.float32, "cuda")
    captured, _ = make_layers(torch.float32, "cuda")
    lr = torch.tensor(0.5, device="cuda")
    optimizer = LAMB(list(captured.values()), lr=lr, weight_decay=0.01)
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
    other = LAMB(list(plain.values()), lr=0.5, weight_decay=0.01)
    for row, rate in zip(grads, (0.5, 0.7, 1.0, 0.2, 0.1, 0.0), strict=True):
        lr.fill_(rate)
        for name, p in captured.items():
            p.grad.copy_(row[name])
        graph.replay()
        run(other, plain, [row], [rate])
    for name in plain:
        torch.testing.assert_close(plain[name], captured[name], rtol=1e-5, atol=1e-6)
