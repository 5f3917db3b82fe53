"""LAMB against NumPy in float64, against its peers, and each known trap."""

from functools import partial
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
from tests.helpers.optim_reference import (
    PATHS,
    RATES,
    ReferenceLAMB,
    as_array,
    assert_alike,
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
    # max_grad_norm and always_adapt: timm clips the global norm to 1 and leaves layers
    # without decay unadapted, unless told otherwise.
    options = {"lr": 1.0, "weight_decay": 0.02, "bias_correction": correction}
    assert_alike(
        partial(LAMB, **options),
        partial(timm.optim.Lamb, max_grad_norm=None, always_adapt=True, **options),
    )


def test_equals_pytorch_optimizer_for_small_weights_without_bias_correction():
    options = {"lr": 1.0, "weight_decay": 0.02, "eps": 1e-12}  # theirs adds eps to |u| as well
    ours = assert_alike(
        partial(LAMB, bias_correction=False, **options),
        # adam_debias: otherwise theirs divides the rate by 1 - beta1^t, after the trust ratio.
        partial(pytorch_optimizer.Lamb, weight_decouple=False, adam_debias=True, **options),
        scale=0.01,
        rtol=1e-8,
        atol=1e-9,
    )
    assert all(torch.linalg.vector_norm(p) < 10 for p in ours)  # theirs clamps |w| there


def test_unadapted_is_torch_adamw():
    options = {"lr": 1.0, "weight_decay": 0.02, "eps": 1e-8}
    assert_alike(
        lambda layers: LAMB([{"params": layers, "adapt": False}], **options),
        partial(torch.optim.AdamW, **options),
    )


@settings(max_examples=30)
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
