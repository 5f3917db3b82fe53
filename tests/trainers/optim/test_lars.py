"""LARS against NumPy in float64, against its peers, and each known trap."""

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

from bigbatch.trainers.optim import LARS
from bigbatch.trainers.optim.lars import _foreach_update, _fused_update
from bigbatch.trainers.optim.layerwise import gradients, new_state, norms
from tests.helpers.optim_reference import (
    PATHS,
    RATES,
    ReferenceLARS,
    as_array,
    assert_alike,
    make_layers,
    run,
    run_reference,
    take,
)

VARIANTS: list[dict[str, Any]] = [
    {
        "momentum": momentum,
        "weight_decay": decay,
        "nesterov": nesterov,
        "momentum_form": form,
        "trust_clip": clip,
        "eps": eps,
    }
    for momentum, decay, nesterov, form, clip, eps in product(
        (0.0, 0.9), (0.0, 0.01), (False, True), ("lr_inside", "lr_outside"), (False, True), (0, 0.1)
    )
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_each_variant_follows_the_formula_in_float64(options, path, monkeypatch):
    device = take(path, monkeypatch)
    params, grads = make_layers(torch.float64, device)
    adapted = {name: name != "vector" for name in params}
    groups = [{"params": [p], "adapt": adapted[name]} for name, p in params.items()]
    options = options | {"trust_coefficient": 0.02}
    optimizer = LARS(groups, lr=1.0, **options)
    references = {
        name: ReferenceLARS(as_array(p), adapt=adapted[name], **options)
        for name, p in params.items()
    }
    # A rate of 0 has no clipped ratio: min(r / 0, 1) is 1 in ours, an error in NumPy's.
    start = 1 if options["trust_clip"] else 0
    run(optimizer, params, grads[start:], RATES[start:])
    run_reference(references, grads[start:], RATES[start:])
    for name, p in params.items():
        reference = references[name]
        np.testing.assert_allclose(as_array(p), reference.w, rtol=1e-12, atol=1e-14)
        buffer = optimizer.state[p]["momentum_buffer"]
        np.testing.assert_allclose(as_array(buffer), reference.v, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_float32_state_and_norms(dtype, path, monkeypatch):
    params, grads = make_layers(dtype, take(path, monkeypatch))
    optimizer = LARS(list(params.values()), lr=1.0, weight_decay=0.01)
    for row, lr in zip(grads[1:], RATES[1:], strict=True):
        expected = {}
        for name, p in params.items():
            reference = ReferenceLARS(as_array(p), momentum=0.9, weight_decay=0.01)
            if p in optimizer.state:
                reference.v = as_array(optimizer.state[p]["momentum_buffer"])
            reference.step(as_array(row[name]), lr)
            expected[name] = torch.from_numpy(reference.w).to(p.device, dtype)
        run(optimizer, params, [row], [lr])
        for name, p in params.items():
            # float32 throughout and rounded once: at most one unit in the last place off.
            assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
            torch.testing.assert_close(p.data, expected[name], rtol=torch.finfo(dtype).eps, atol=0)
            assert (p.data == expected[name]).float().mean() > 0.98


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_equals_timm_with_the_rate_outside(nesterov, clip):
    # always_adapt, because timm leaves layers without decay unadapted.
    options = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": nesterov}
    options |= {"trust_clip": clip, "eps": 1e-8}
    assert_alike(
        partial(LARS, momentum_form="lr_outside", **options),
        partial(timm.optim.Lars, always_adapt=True, **options),
        start=1,
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_pytorch_optimizer_with_the_rate_outside(nesterov):
    options = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": nesterov}
    assert_alike(
        partial(LARS, momentum_form="lr_outside", **options),
        partial(pytorch_optimizer.LARS, **options),
        # It leaves vectors alone, by their dimension; and where g is 0 it still adapts.
        without=("vector", "linear"),
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_unadapted_is_torch_sgd(nesterov):
    options = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": nesterov}
    assert_alike(
        lambda layers: LARS(
            [{"params": layers, "adapt": False}], momentum_form="lr_outside", **options
        ),
        partial(torch.optim.SGD, **options),
        rtol=1e-12,
        atol=1e-14,
    )


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(3,), (1, 1), (5, 4), (2, 3, 3, 3), (4, 1, 5)]),
    lr=st.floats(0, 10),
    momentum=st.floats(0.1, 0.99),
    decay=st.floats(0, 0.1),
    ratio=st.floats(1e-6, 2),
    nesterov=st.booleans(),
    form=st.sampled_from(["lr_inside", "lr_outside"]),
    adapt=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_fused_and_the_multi_tensor_update_agree(
    shape, lr, momentum, decay, ratio, nesterov, form, adapt, seed
):
    generator = torch.Generator().manual_seed(seed)
    group = {
        "lr": lr,
        "momentum": momentum,
        "weight_decay": decay,
        "nesterov": nesterov,
        "momentum_form": form,
    }
    ratios = torch.tensor([ratio], dtype=torch.float64) if adapt else None
    results = []
    p, g, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    for update in (_fused_update, _foreach_update):
        copies = [[t.clone()] for t in (p, g, v)]
        update(copies[0], copies[1], copies[2], ratios, group)
        assert torch.equal(copies[1][0], g), "the gradient was changed"
        results.append(copies)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-10, atol=1e-11)


def test_the_first_step_is_scaled_like_every_other():
    """A popular LARS seeds the momentum with the raw gradient: its first step is far too large."""
    p = nn.Parameter(torch.ones(10, 10, dtype=torch.float64))
    p.grad = torch.full_like(p, 0.01)
    LARS([p], lr=2.0, trust_coefficient=0.001).step()
    step = torch.linalg.vector_norm(1.0 - p.detach()).item()
    assert step == pytest.approx(2.0 * 0.001 * 10.0)  # lr x coefficient x |w|, whatever g is


def test_layers_without_decay_are_adapted_too():
    """timm skips the trust ratio where weight decay is 0."""
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.full_like(p, 100.0)
    optimizer = LARS([p], lr=1.0, weight_decay=0.0)
    optimizer.step()
    assert optimizer.last_ratios[0][1].item() == pytest.approx(0.001 * 4.0 / 400.0)


def test_epsilon_zero_stays_zero():
    """Keras replaces an epsilon of 0 by its default; with tiny norms that changes the ratio."""
    p = nn.Parameter(torch.full((2, 2), 1e-9, dtype=torch.float64))
    p.grad = torch.full_like(p, 1e-9)
    optimizer = LARS([p], lr=1.0, eps=0.0)
    optimizer.step()
    assert optimizer.last_ratios[0][1].item() == pytest.approx(0.001)


def test_clipping_bounds_the_rate_of_every_layer():
    params, grads = make_layers(torch.float64)
    optimizer = LARS(list(params.values()), lr=0.05, trust_coefficient=10.0, trust_clip=True)
    run(optimizer, params, grads, [0.05] * len(grads))
    ratios = torch.cat([ratios for _, ratios in optimizer.last_ratios])
    assert (ratios <= 1.0).all()


def test_norms_do_not_depend_on_threads_alignment_or_size():
    """A BLAS dot product fails the first two, one long float32 sum the third."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(512, 512, 3, 3, generator=generator)
    found = set()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for offset in range(3):
                flat = torch.empty(values.numel() + 8)
                moved = flat[offset : offset + values.numel()].view(values.shape).copy_(values)
                found.add(norms([moved]).item())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
    exact = torch.linalg.vector_norm(values.double()).item()
    assert found.pop() == pytest.approx(exact, rel=3e-7)


def test_a_step_on_a_device_reads_nothing_back():
    """On meta tensors, which have no values, any read-back raises; also with lr as a tensor."""
    for nesterov, form in product((False, True), ("lr_inside", "lr_outside")):
        p = nn.Parameter(torch.empty(4, 4, device="meta"))
        p.grad = torch.empty(4, 4, device="meta")
        options = {"nesterov": nesterov, "momentum_form": form, "trust_clip": True}
        optimizer = LARS([p], lr=torch.empty((), device="meta"), **options)
        optimizer.step()
        assert optimizer.state[p]["momentum_buffer"].shape == (4, 4)
        with pytest.raises((RuntimeError, NotImplementedError)):
            optimizer.last_ratios[0][1].tolist()


def test_a_rate_held_as_a_tensor_gives_the_same_weights():
    ours, grads = make_layers(torch.float64)
    other, _ = make_layers(torch.float64)
    first, second = LARS(list(ours.values()), lr=1.0), LARS(list(other.values()), lr=1.0)
    for group in second.param_groups:
        group["lr"] = torch.tensor(0.7, dtype=torch.float64)
    for optimizer, params in ((first, ours), (second, other)):
        for name, p in params.items():
            p.grad = grads[0][name].clone()
        for group in first.param_groups:
            group["lr"] = 0.7
        optimizer.step()
    for name in ours:
        assert torch.equal(ours[name], other[name])


def test_groups_may_mix_dtypes_and_parameters_without_gradient():
    a = nn.Parameter(torch.ones(3, 3))
    b = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
    unused = nn.Parameter(torch.ones(3, 3))
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer = LARS([a, b, unused], lr=100.0)
    optimizer.step()
    assert unused not in optimizer.state
    assert torch.equal(unused.data, torch.ones(3, 3))
    torch.testing.assert_close(a.detach(), torch.full((3, 3), 0.9))
    torch.testing.assert_close(b.detach().float(), torch.full((3, 3), 0.9), rtol=1e-2, atol=0)


def test_gradients_of_1x1_convolutions_are_taken_as_they_are_in_either_memory_order() -> None:
    """NHWC gives their last two strides other values, which say nothing of the order."""
    p = nn.Parameter(torch.randn(8, 4, 1, 1))
    p.grad = torch.randn(8, 1, 1, 4).permute(0, 3, 1, 2)
    assert p.grad.stride() != p.stride()
    assert gradients([p], [new_state(p)])[0] is p.grad
    turned = nn.Parameter(torch.randn(8, 4, 3, 3))
    turned.grad = torch.randn(8, 3, 3, 4).permute(0, 3, 1, 2)
    assert gradients([turned], [new_state(turned)])[0].stride() == turned.stride()
