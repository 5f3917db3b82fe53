"""LARS, LAMB and Muon written out in NumPy float64, one layer at a time, from their formulas.

Written apart from the implementation, in scalars and plain arrays, so that agreement means
something.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bigbatch.trainers.optim import lamb, lars, layerwise

# "multi-tensor": the path of a GPU, taken on the CPU.
PATHS = ["cpu", "multi-tensor", *(["cuda"] if torch.cuda.is_available() else [])]


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device for a path of PATHS; for "multi-tensor", make the optimizers take it."""
    if path == "multi-tensor":
        for module in (layerwise, lars, lamb):
            monkeypatch.setattr(module, "on_cpu", lambda tensors: False)
        return "cpu"
    return path


Array = np.ndarray[Any, np.dtype[np.float64]]


class ReferenceLARS:
    """You et al. 2017, algorithm 1, for one layer."""

    def __init__(
        self,
        w: Array,
        *,
        momentum: float,
        weight_decay: float,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        momentum_form: str = "lr_inside",
        trust_clip: bool = False,
        adapt: bool = True,
    ) -> None:
        self.w, self.v = w.copy(), np.zeros_like(w)
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        self.trust_coefficient, self.eps, self.form = trust_coefficient, eps, momentum_form
        self.trust_clip, self.adapt = trust_clip, adapt
        self.ratio = 1.0

    def step(self, g: Array, lr: float) -> None:
        w_norm, g_norm = np.sqrt((self.w**2).sum()), np.sqrt((g**2).sum())
        self.ratio = 1.0
        if self.adapt and w_norm > 0 and g_norm > 0:
            self.ratio = (
                self.trust_coefficient * w_norm / (g_norm + self.weight_decay * w_norm + self.eps)
            )
            if self.trust_clip:
                self.ratio = min(self.ratio / lr, 1.0)
        scaled = self.ratio * (g + self.weight_decay * self.w)
        if self.form == "lr_inside":
            self.v = self.momentum * self.v + lr * scaled
            self.w = self.w - (lr * scaled + self.momentum * self.v if self.nesterov else self.v)
        else:
            self.v = self.momentum * self.v + scaled
            self.w = self.w - lr * (scaled + self.momentum * self.v if self.nesterov else self.v)


class ReferenceLAMB:
    """You et al. 2020, algorithm 2, for one layer."""

    def __init__(
        self,
        w: Array,
        *,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        bias_correction: bool = True,
        trust_bounds: tuple[float, float] | None = None,
        adapt: bool = True,
    ) -> None:
        self.w, self.m, self.v, self.t = w.copy(), np.zeros_like(w), np.zeros_like(w), 0
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.bias_correction, self.bounds, self.adapt = bias_correction, trust_bounds, adapt
        self.ratio = 1.0

    def step(self, g: Array, lr: float) -> None:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v = self.m, self.v
        if self.bias_correction:
            m, v = m / (1 - b1**self.t), v / (1 - b2**self.t)
        u = m / (np.sqrt(v) + self.eps) + self.weight_decay * self.w
        w_norm, u_norm = np.sqrt((self.w**2).sum()), np.sqrt((u**2).sum())
        self.ratio = 1.0
        if self.adapt and w_norm > 0 and u_norm > 0:
            self.ratio = w_norm / u_norm
            if self.bounds is not None:
                self.ratio = min(max(self.ratio, self.bounds[0]), self.bounds[1])
        self.w = self.w - lr * self.ratio * u


class ReferenceMuon:
    """Jordan et al. 2024 and Liu et al. 2025 for one layer, by its singular values."""

    def __init__(
        self,
        w: Array,
        *,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        adjust_lr: str,
        ns_steps: int = 5,
    ) -> None:
        self.w, self.v = w.copy(), np.zeros_like(w)
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        self.adjust_lr, self.ns_steps = adjust_lr, ns_steps

    def step(self, g: Array, lr: float) -> None:
        m = self.momentum
        self.v = m * self.v + (1 - m) * g
        u = (1 - m) * g + m * self.v if self.nesterov else self.v
        rows, columns = len(u), u[0].size
        scale = 0.2 * max(rows, columns) ** 0.5
        if self.adjust_lr == "original":
            scale = max(1.0, rows / columns) ** 0.5
        o = orthogonal(u.reshape(rows, columns), self.ns_steps).reshape(u.shape)
        self.w = self.w - lr * self.weight_decay * self.w - lr * scale * o


def orthogonal(matrix: Array, steps: int) -> Array:
    """What `steps` Newton-Schulz iterations make of a matrix, by its singular values."""
    u, s, vt = np.linalg.svd(matrix / max(1e-7, np.sqrt((matrix**2).sum())), full_matrices=False)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    made: Array = (u * s) @ vt
    return made


SHAPES = {"conv": (6, 3, 3, 3), "linear": (10, 6), "vector": (7,), "zeros": (4, 5)}
RATES = [0.0, 0.7, 1.3, 2.0, 0.4, 0.1]  # a warmup from 0 and a decay


def make_layers(
    dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[dict[str, nn.Parameter], list[dict[str, torch.Tensor]]]:
    """Layers of each kind, and their gradients for every rate in RATES.

    The layer "zeros" starts at zero; the gradient of "linear" is zero in step 1. The
    convolution's weights are channels last in memory, its gradients contiguous.
    """
    generator = torch.Generator().manual_seed(seed)
    params, grads = {}, []
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
        if name == "zeros":
            value.zero_()
        if name == "conv":
            value = value.to(memory_format=torch.channels_last)
        params[name] = nn.Parameter(value.to(device, dtype))
    for step in range(len(RATES)):
        row = {}
        for name, shape in SHAPES.items():
            g = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.05
            if name == "linear" and step == 1:
                g.zero_()
            row[name] = g.to(device, dtype)
        grads.append(row)
    return params, grads


def run(
    optimizer: torch.optim.Optimizer,
    params: dict[str, nn.Parameter],
    grads: list[dict[str, torch.Tensor]],
    rates: list[float],
) -> None:
    for row, lr in zip(grads, rates, strict=True):
        for name, p in params.items():
            p.grad = row[name].clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


def assert_alike(
    ours: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    theirs: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    without: Sequence[str] = (),
    start: int = 0,
    scale: float = 1.0,
    rtol: float = 1e-10,
    atol: float = 1e-13,
) -> list[nn.Parameter]:
    """Two optimizers, each built over its own copy of the layers, end with the same weights.

    They make the steps from `start` with `scale` times RATES; `without` names layers to leave
    out. Returns ours.
    """
    ends = []
    for build in (ours, theirs):
        params, grads = make_layers(torch.float64)
        params = {name: p for name, p in params.items() if name not in without}
        rates = [scale * rate for rate in RATES[start:]]
        run(build(list(params.values())), params, grads[start:], rates)
        ends.append(list(params.values()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    return ends[0]


def run_reference(
    references: dict[str, Any], grads: list[dict[str, torch.Tensor]], rates: list[float]
) -> None:
    for row, lr in zip(grads, rates, strict=True):
        for name, reference in references.items():
            reference.step(row[name].double().cpu().numpy(), lr)


def as_array(t: torch.Tensor) -> Array:
    return t.detach().double().cpu().numpy().copy()
