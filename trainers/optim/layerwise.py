"""What LARS and LAMB share: float32 state, norms, and the walk over parameters in buckets."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# On a CPU, parameters are handled a few at a time, so that what the norms have read is
# still in the last-level cache when the update reads it again. A GPU gets them all at once:
# there the cost is the number of kernel launches.
CPU_BUCKET = 1 << 20  # elements


class LayerwiseOptimizer(torch.optim.Optimizer):
    """Base of LARS and LAMB: makes the state, walks the groups, keeps the trust ratios.

    Parameters may be pieces of layers that other ranks hold the rest of, possibly empty, the
    same layers in the same order on every rank. `sum_over_ranks` then adds a tensor up over
    those ranks: a layer's norm is the root of the sum of its pieces' squared norms.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None
        # Of the last step, for logging: tensors, so that nothing waits for the device.
        self.last_ratios: list[tuple[list[Tensor], Tensor]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient. Returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.last_ratios = []
        work = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = self.init_state(p)
            work.append((params, group))
        if self.sum_over_ranks is None:
            for params, group in work:
                for bucket in buckets(params):
                    if group["adapt"]:
                        vectors = self.vectors(bucket, group)
                        self.update(bucket, vectors, (norms(bucket), norms(vectors)), group)
                    else:
                        self.update_unadapted(bucket, group)
        else:
            self._sharded_step([(p, group) for p, group in work if p], self.sum_over_ranks)
        return loss

    def _sharded_step(
        self,
        work: list[tuple[list[Tensor], dict[str, Any]]],
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        """The same for pieces of layers, with one all-reduce for all norms of the step."""
        adapted = [(p, self.vectors(p, group), group) for p, group in work if group["adapt"]]
        if adapted:
            squares = [torch.stack([squared_norms(w), squared_norms(v)]) for w, v, _ in adapted]
            total = sum_over_ranks(torch.cat(squares, dim=1)).sqrt()
            sizes = [len(w) for w, _, _ in adapted]
            lengths = total.to(state_dtype(adapted[0][0][0])).split(sizes, dim=1)
            for (params, vectors, group), (w_length, v_length) in zip(
                adapted, lengths, strict=True
            ):
                self.update(params, vectors, (w_length, v_length), group)
        for params, group in work:
            if not group["adapt"]:
                self.update_unadapted(params, group)

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def vectors(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """What the trust ratio compares the parameters with; they are of one device and dtype."""
        raise NotImplementedError

    def update(
        self,
        params: list[Tensor],
        vectors: list[Tensor],
        lengths: tuple[Tensor, Tensor] | None,
        group: dict[str, Any],
    ) -> None:
        """Update the parameters; `lengths` are the norms of layers and of their vectors, and
        None stands for a trust ratio of 1."""
        raise NotImplementedError

    def update_unadapted(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update the parameters of a group whose trust ratio is 1."""
        self.update(params, self.vectors(params, group), None, group)


def buckets(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of one device and dtype; on a CPU of at most CPU_BUCKET elements, or one tensor."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        kinds.setdefault((p.device, p.dtype), []).append(p)
    for same in kinds.values():
        if not on_cpu(same):
            yield same
            continue
        bucket: list[Tensor] = []
        size = 0
        for p in same:
            if bucket and size + p.numel() > CPU_BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(p)
            size += p.numel()
        yield bucket


def same_memory(params: list[Tensor], states: list[Tensor]) -> bool:
    """Whether a kernel that walks raw memory can take parameters and state together."""
    return all(
        p.dtype == s.dtype and p.stride() == s.stride() for p, s in zip(params, states, strict=True)
    )


def on_cpu(tensors: list[Tensor]) -> bool:
    """Whether tensors of one device live on the CPU, where single passes over a few tensors
    are fast and reading a value back costs nothing."""
    return tensors[0].device.type == "cpu"


def state_dtype(p: Tensor) -> torch.dtype:
    """float32 at least: bf16 and fp16 parameters keep float32 state, norms and updates."""
    return torch.promote_types(p.dtype, torch.float32)


def new_state(p: Tensor) -> Tensor:
    """A zero buffer with the parameter's shape and memory layout, in `state_dtype`."""
    return torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)


def upcast(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in `state_dtype`: themselves where they are in it already, else copies."""
    return [t.to(state_dtype(t)) for t in tensors]


def gradients(params: list[Tensor], states: list[Tensor]) -> list[Tensor]:
    """The parameters' gradients, laid out in memory as the state is.

    torch's fused kernels walk raw memory: a gradient in another layout (channels last, or a
    view into a communication buffer) would meet the wrong elements.
    """
    grads = []
    for p, state in zip(params, states, strict=True):
        assert p.grad is not None
        assert not p.grad.is_sparse, "layer-wise optimizers need dense gradients"
        same = p.grad.stride() == state.stride()
        grads.append(p.grad if same else torch.empty_like(state, dtype=p.dtype).copy_(p.grad))
    return grads


def norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, shape [len(tensors)], in `state_dtype`, on the device.

    On a CPU the norm is taken by rows first. One float32 sum over two million elements is
    off in the fifth digit, and a BLAS dot product depends on alignment and thread count; by
    rows it is exact to the seventh digit, and the same for any number of threads.
    """
    dtype = state_dtype(tensors[0])
    if on_cpu(tensors):
        return torch.stack([_norm_by_rows(t, dtype) for t in tensors])
    return torch.stack(torch._foreach_norm(tensors, 2, dtype))


def squared_norms(tensors: list[Tensor]) -> Tensor:
    """Squared norm of each tensor, float64 [len(tensors)], on the device; 0 of an empty one.

    In float64, so that the sum over pieces does not depend on where a layer was cut.
    """
    if on_cpu(tensors):
        return torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]) ** 2
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float64)).square()


def _norm_by_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    if t.ndim > 1:
        t = torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)), dtype=dtype)
    return torch.linalg.vector_norm(t, dtype=dtype)


def positive_or_one(ratio: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`ratio` where both norms are positive, else 1: a layer of zeros takes the plain rate."""
    return torch.where((a > 0) & (b > 0), ratio, torch.ones_like(ratio))
