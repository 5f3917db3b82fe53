"""What LARS and LAMB share: fp32 state, norms, and the walk over parameters in buckets."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# On a CPU, parameters are handled a few at a time, so that what the norms have read is
# still in the last-level cache when the update reads it again. A GPU gets them all at once:
# there the cost is the number of kernel launches.
CPU_BUCKET = 1 << 19  # elements


def buckets(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split into runs of about CPU_BUCKET elements; one run of everything on other devices."""
    limit = CPU_BUCKET if params and params[0].device.type == "cpu" else None
    bucket: list[Tensor] = []
    size = 0
    for p in params:
        if bucket and limit is not None and size + p.numel() > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


def state_dtype(p: Tensor) -> torch.dtype:
    """float32 at least: bf16 and fp16 parameters keep float32 state, norms and updates."""
    return torch.promote_types(p.dtype, torch.float32)


def new_state(p: Tensor) -> Tensor:
    """A zero buffer with the parameter's shape and memory layout, in `state_dtype`."""
    return torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)


def gradients(params: list[Tensor]) -> list[Tensor]:
    """The parameters' gradients, in the parameters' memory layout.

    torch's fused kernels walk raw memory: a gradient in another layout (channels last, or a
    view into a communication buffer) would be added to the wrong elements.
    """
    grads = []
    for p in params:
        assert p.grad is not None
        g = p.grad
        if g.is_sparse:
            raise RuntimeError("layer-wise optimizers need dense gradients")
        grads.append(g if g.stride() == p.stride() else torch.empty_like(p).copy_(g))
    return grads


def norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, as one vector in `state_dtype`, without a host sync.

    On a CPU the norm is taken by rows first. One long float32 sum is off in the fifth digit
    at two million elements, and BLAS dot products depend on thread count and alignment; the
    sum by rows is exact to the seventh digit and the same for any number of threads.
    """
    dtype = state_dtype(tensors[0])
    if tensors[0].device.type == "cpu":
        return torch.stack([_norm_by_rows(t, dtype) for t in tensors])
    return torch.stack(torch._foreach_norm(tensors, 2, dtype))


def _norm_by_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    if t.ndim < 2:
        return torch.linalg.vector_norm(t, dtype=dtype)
    rows = torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)), dtype=dtype)
    return torch.linalg.vector_norm(rows)


def where_positive(value: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`value` where both norms are positive, else 1: a zero layer takes the plain rate."""
    return torch.where((a > 0) & (b > 0), value, torch.ones_like(value))


def upcast(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in `state_dtype`: themselves where they are in it already, else copies."""
    return [t.to(state_dtype(t)) for t in tensors]


class LayerwiseOptimizer(torch.optim.Optimizer):
    """Base of LARS and LAMB: keeps the last step's trust ratios for logging."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.last_ratios: list[tuple[list[Tensor], Tensor]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient. Returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.last_ratios = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = self.init_state(p)
            self.update(params, group)
        return loss

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError
