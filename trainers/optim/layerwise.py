"""What LARS and LAMB share: float32 state, norms, and the walk over parameters."""

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bigbatch.trainers.optim.gpu import Tables

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
        self._begin()

    def _begin(self) -> None:
        # Of the last step, for logging: tensors, so that nothing waits for the device.
        self.last_ratios: list[tuple[list[Tensor], Tensor]] = []
        self._tables: dict[Tensor, Tables] = {}
        self._kernels: ModuleType | None = None  # chosen by the device

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which torch makes from groups and state alone, and of `load_state_dict`."""
        super().__setstate__(state)
        if "_tables" not in self.__dict__:
            self.sum_over_ranks = None
            self._begin()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient. Returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.last_ratios = []
        together = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = self.init_state(p)
            for same in of_one_kind(params):
                if self.sum_over_ranks is None and on_cpu(same):
                    self._step_in_buckets(same, group)
                else:
                    together.append((same, group))
        self._step_together(together)
        return loss

    @torch.no_grad()
    def step_by(self, kernels: ModuleType) -> None:
        """One step of all parameters by these kernels, on any device: what they are tried with."""
        self._kernels = kernels
        work = [(group["params"], group) for group in self.param_groups]
        for params, _ in work:
            self.state.update({p: self.init_state(p) for p in params})
        self._step_together(work)
        if not self._tables:
            raise TypeError(f"the kernels do not take these parameters of {type(self).__name__}")

    def _step_in_buckets(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for bucket in buckets(params):
            if group["adapt"]:
                vectors = self.vectors(bucket, group)
                self.update(bucket, vectors, (norms(bucket), norms(vectors)), group)
            else:
                self.update_unadapted(bucket, group)

    def _step_together(self, work: list[tuple[list[Tensor], dict[str, Any]]]) -> None:
        """First all norms, then all updates: one all-reduce in between serves all layers."""
        adapted = [(p, group, *self.measure(p, group)) for p, group in work if group["adapt"]]
        squares = [of_group for *_, of_group in adapted]
        if adapted and self.sum_over_ranks is not None:
            lengths = [len(params) for params, *_ in adapted]
            squares = list(self.sum_over_ranks(torch.cat(squares)).split(lengths))
        for (params, group, measured, _), of_group in zip(adapted, squares, strict=True):
            self.finish(params, measured, of_group, group)
        for params, group in work:
            if not group["adapt"]:
                self.update_unadapted(params, group)

    def measure(self, params: list[Tensor], group: dict[str, Any]) -> tuple[Any, Tensor]:
        """The first half of a step: what `finish` needs of it, and the squared norms of layers
        and of the vectors that the trust ratio compares them with, float64 [layers, 2]."""
        vectors = self.vectors(params, group)
        return vectors, torch.stack([squared_norms(params), squared_norms(vectors)], dim=1)

    def finish(
        self, params: list[Tensor], measured: Any, squares: Tensor, group: dict[str, Any]
    ) -> None:
        """The second half: update the parameters."""
        w_length, v_length = squares.sqrt().to(state_dtype(params[0])).unbind(1)
        self.update(params, measured, (w_length, v_length), group)

    def tables(self, *roles: list[Tensor]) -> "Tables | None":
        """Parameters of one kind, and what else there is of each (tensors of its shape or
        numbers), for the kernels of `gpu`: gradients and then state. None where these do not
        run, or do not know the dtype or the memory layout."""
        params = roles[0]
        device, dtype = params[0].device, params[0].dtype
        kind: Any = type(self)
        kernels = self._kernels or gpu_kernels(kind, device)
        if kernels is None or dtype not in kernels.KINDS:
            return None
        for number, role in enumerate(roles[1:]):
            # Kernels take addresses: what lies elsewhere or is of another dtype is not noticed.
            known = dtype if number == 0 else torch.float32
            pairs = zip(params, role, strict=True)
            if not all(
                t.dtype == known and t.device == device and (t.ndim == 0 or same_layout(p, t))
                for p, t in pairs
            ):
                return None
        tables = self._tables.get(params[0])
        if tables is None or not tables.are_of(params):
            tables = self._tables[params[0]] = kernels.Tables(params, tables)
        tables.point_at(*roles)
        return tables

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


@cache
def gpu_kernels(kind: Callable[..., LayerwiseOptimizer], device: torch.device) -> ModuleType | None:
    """The module `gpu` where its kernels step this optimizer on this device; where they should
    and do not, the reason is said once, and torch's multi-tensor operations serve."""
    if device.type != "cuda":
        return None
    try:
        from bigbatch.trainers.optim import gpu

        reason = gpu.refusal(kind, device)
    except ImportError as error:  # torch comes with Triton on Linux
        reason = str(error)
    if reason is None:
        return gpu
    name = getattr(kind, "__name__", "the optimizer")
    warnings.warn(f"{name} steps without Triton, which is slower: {reason}", stacklevel=2)
    return None


def of_one_kind(params: list[Tensor]) -> list[list[Tensor]]:
    """The parameters by device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        kinds.setdefault((p.device, p.dtype), []).append(p)
    return list(kinds.values())


def buckets(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of at most CPU_BUCKET elements, or of one tensor."""
    bucket: list[Tensor] = []
    size = 0
    for p in params:
        if bucket and size + p.numel() > CPU_BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


def same_memory(params: list[Tensor], states: list[Tensor]) -> bool:
    """Whether a kernel that walks raw memory can take parameters and state together."""
    return all(
        p.dtype == s.dtype and same_layout(p, s) for p, s in zip(params, states, strict=True)
    )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether elements of two dense tensors of one shape lie in the same order. The stride of
    a dimension of size 1 says nothing: 1x1 convolutions get different ones under NHWC."""
    if a.stride() == b.stride():
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(n == 1 or own == other for n, own, other in strides)


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
        same = same_layout(p.grad, state)
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
