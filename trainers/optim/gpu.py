"""LARS and LAMB on a GPU in as few passes over memory as their norms allow.

torch's multi-tensor operations have none with a factor for each layer: a trust ratio costs a
kernel for each layer, and every operation is a pass over memory. Here a step is three kernels
(Triton), whatever the number of layers: sums of squares of chunks; their sums for each layer;
the update. LARS moves 7 values for each weight through memory (SGD 5), LAMB 10 (AdamW 7), and
neither needs a temporary.
"""

import math
import operator
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor

from bigbatch.trainers.optim import kernels

if TYPE_CHECKING:
    from bigbatch.trainers.optim.layerwise import LayerwiseOptimizer

CHUNK = 2048  # elements; 4 warps of 32 threads hold 16 each
SUMMED = 1024  # partial sums that a program adds up at a time
OPTIONS = {"enable_fp_fusion": True}  # said, since Triton's default is about to change
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@cache
def refusal(kind: "Callable[..., LayerwiseOptimizer]", device: torch.device) -> str | None:
    """Why the kernels shall not step this optimizer on this device; None where they do it right.

    A machine without a C compiler, a new driver or a new Triton must not spoil a training.
    """
    try:
        error = _error(kind, device)
    except Exception as problem:  # Triton's compiler, the linker and the driver have their own
        return f"{type(problem).__name__}: {problem}"
    return None if error < 1e-5 else f"a step is off by {error:.1g} of a weight's length"


def _error(kind: "Callable[..., LayerwiseOptimizer]", device: torch.device) -> float:
    """The largest relative distance of a step on the device from the same on the CPU."""
    generator = torch.Generator().manual_seed(0)
    sizes = 3, 2 * CHUNK + 5
    reference = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in sizes]
    weights = [torch.nn.Parameter(p.detach().clone().to(device)) for p in reference]
    for w, p in zip(weights, reference, strict=True):
        p.grad = torch.randn(p.shape, generator=generator)
        w.grad = p.grad.to(device, copy=True)
    kind(reference, lr=0.1, weight_decay=0.1).step()
    kind(weights, lr=0.1, weight_decay=0.1).step_by(sys.modules[__name__])
    pairs = zip(weights, reference, strict=True)
    return max(float((w.detach().cpu() - p.detach()).norm() / p.detach().norm()) for w, p in pairs)


class Tables:
    """Tensors of one device and dtype, a layer or a piece of one each, as the kernels see them."""

    def __init__(self, params: list[Tensor], replaced: "Tables | None" = None) -> None:
        self.params = params
        self.layers = len(params)
        self.dtype = params[0].dtype
        self.kind = KINDS[self.dtype]
        self.device = params[0].device
        # Triton launches on the current device, whatever it is given.
        self._on_device = torch.cuda.device(self.device.index if params[0].is_cuda else -1)
        sizes = torch.tensor([p.numel() for p in params])
        # An empty piece of a layer has a chunk too: the one that writes the layer's ratio.
        counts = ((sizes + CHUNK - 1) // CHUNK).clamp(min=1)
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        layer = torch.arange(self.layers).repeat_interleave(counts)
        number = torch.arange(len(layer)) - first[layer]
        self.count = len(layer)
        self.sizes = sizes.to(self.device)
        self.first = first.to(self.device)
        self.chunks = torch.stack([layer, number], dim=1).to(self.device)
        self.addresses = torch.empty(0, dtype=torch.int64)
        self._pointers: list[int] = []
        self._host = self.addresses
        self._captured: list[Any] = [replaced] if replaced and replaced._captured else []

    def are_of(self, params: list[Tensor]) -> bool:
        same = (params[0].device, params[0].dtype) == (self.device, self.dtype)
        return same and len(params) == self.layers and all(map(operator.is_, params, self.params))

    def point_at(self, *roles: list[Tensor]) -> None:
        """Set `addresses`, int64 [roles, layers] on the device, to where the roles' tensors lie.

        Copied without waiting, and only where one has moved. A graph reads what it was
        captured with for as long as it lives, so that is kept.
        """
        pointers = [t.data_ptr() for role in roles for t in role]
        on_gpu = self.device.type != "cpu"
        with self._on_device:
            capturing = on_gpu and torch.cuda.is_current_stream_capturing()
            if pointers != self._pointers:
                # A captured copy runs with its graph: any other step needs one of its own.
                self._pointers = [] if capturing else pointers
                host = torch.tensor(pointers).view(len(roles), self.layers)
                self._host = host.pin_memory() if on_gpu else host
                self.addresses = self._host.to(self.device, non_blocking=True)
        if capturing:
            self._captured.append((self._host, self.addresses))

    def _launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        with self._on_device:
            kernel[(programs,)](*arguments, **constants, **OPTIONS)

    def partial(self) -> Tensor:
        """Room for two sums of each chunk."""
        return torch.empty(2, self.count, device=self.device)

    def sums(self, partial: Tensor) -> Tensor:
        """The sums of each layer's chunks, float64 [layers, 2]."""
        out = torch.empty(self.layers, 2, dtype=torch.float64, device=self.device)
        self._launch(
            kernels.layer_sums, self.layers,
            partial, self.first, out, self.count, BLOCK=SUMMED,
        )  # fmt: skip
        return out

    def ratios(self) -> Tensor:
        """Room for the layers' trust ratios."""
        return torch.empty(self.layers, device=self.device)

    def lars_squares(self) -> Tensor:
        """Squared norms of weights and gradients, float64 [layers, 2].

        Roles of the tables: weights, gradients, momentum buffers.
        """
        partial = self.partial()
        self._launch(
            kernels.lars_squares, self.count,
            self.addresses, self.chunks, self.sizes, partial, self.layers, self.count,
            self.kind, CHUNK=CHUNK,
        )  # fmt: skip
        return self.sums(partial)

    def lars_update(self, squares: Tensor | None, group: dict[str, Any]) -> Tensor:
        """Update weights and momentum; the trust ratios, all 1 where `squares` is None."""
        ratios = self.ratios()
        lr = _rate(group["lr"])
        self._launch(
            kernels.lars_update, self.count,
            self.addresses, self.chunks, self.sizes, ratios if squares is None else squares,
            ratios, lr, float(group["momentum"]), float(group["weight_decay"]),
            float(group["trust_coefficient"]), float(group["eps"]), self.layers, self.kind,
            ADAPT=squares is not None,
            INSIDE=group["momentum_form"] == "lr_inside",
            NESTEROV=group["nesterov"],
            CLIP=group["trust_clip"],
            LR_ON_DEVICE=isinstance(lr, Tensor),
            CHUNK=CHUNK,
        )  # fmt: skip
        return ratios

    def lamb_moments(self, group: dict[str, Any]) -> Tensor:
        """Advance the moments; squared norms of weights and of u, float64 [layers, 2].

        Roles of the tables: weights, gradients, first and second moments, numbers of this step.
        """
        partial = self.partial()
        beta1, beta2 = map(float, group["betas"])
        self._launch(
            kernels.lamb_moments, self.count,
            self.addresses, self.chunks, self.sizes, partial,
            beta1, beta2, 1 - beta1, 1 - beta2, _log(beta1), _log(beta2), float(group["eps"]),
            float(group["weight_decay"]), self.layers, self.count, self.kind,
            CORRECT=group["bias_correction"],
            CHUNK=CHUNK,
        )  # fmt: skip
        return self.sums(partial)

    def lamb_update(self, squares: Tensor, group: dict[str, Any]) -> Tensor:
        """Update the weights by u, which the moments give again; returns the trust ratios."""
        ratios = self.ratios()
        lr = _rate(group["lr"])
        low, high = map(float, group["trust_bounds"] or (0, math.inf))
        beta1, beta2 = map(float, group["betas"])
        self._launch(
            kernels.lamb_update, self.count,
            self.addresses, self.chunks, self.sizes, squares, ratios, lr, low, high,
            _log(beta1), _log(beta2), float(group["eps"]),
            float(group["weight_decay"]), self.layers, self.kind,
            CORRECT=group["bias_correction"],
            LR_ON_DEVICE=isinstance(lr, Tensor),
            CHUNK=CHUNK,
        )  # fmt: skip
        return ratios


def _rate(lr: float | Tensor) -> float | Tensor:
    """A rate on a GPU stays there; one on the host is an argument."""
    return lr if isinstance(lr, Tensor) and not lr.is_cpu else float(lr)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
