"""Muon: momentum made orthogonal by Newton-Schulz iterations (Jordan et al. 2024)."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bigbatch.trainers.optim.layerwise import LayerwiseOptimizer, gradients, new_state, state_dtype

# Of x = a x + b x^3 + c x^5, chosen for their slope at 0; singular values end within 0.7 and 1.2
# (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
COEFFICIENTS = 3.4445, -4.7750, 2.0315
_CHAIN = 3  # steps from one Gram matrix
EPS = 1e-7  # the least norm that a matrix is divided by (same source)


class LayerExchange(Protocol):
    """Puts layers together whose pieces lie on several ranks, and takes them apart again."""

    def gather(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Whole tensors of the layers that are this rank's to compute, from all layers' pieces."""

    def scatter(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """This rank's pieces of all layers, from each rank's whole ones."""

    def shapes(self) -> list[torch.Size]:
        """Of all layers, in the order of their pieces, when they are whole."""


class Muon(torch.optim.Optimizer):
    """Steps along an orthogonal matrix near each weight's momentum; another optimizer for the rest.

    With weights w as a matrix [out, in x kh x kw], gradient g, momentum m, decay b:

        v = m v + (1 - m) g;   u = (1 - m) g + m v with Nesterov, else v
        o = `orthogonalise`(u)
        w = (1 - lr b) w - lr s o
        original:   s = sqrt(max(1, out / in kh kw))      (Jordan et al. 2024)
        match_rms:  s = 0.2 sqrt(max(out, in kh kw))      (Liu et al. 2025, arXiv:2502.16982, eq. 4)

    A grouped convolution is one matrix like any other. State: `momentum_buffer`, float32 at least.
    `lr` may be a float or a 0-dim tensor; nothing is read back from a GPU, so that a step can be
    captured in a graph. Layers of one shape are computed together, in all groups.

    `rest` updates its own parameters in the same step; its groups follow Muon's in `param_groups`,
    with `use_muon` False. Parameters may be pieces of layers, the same layers in the same order on
    every rank: `exchange` then puts their momentum together, each layer on one rank.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        adjust_lr: str = "original",
        ns_steps: int = 5,
        ns_precision: str = "fp32",
        rest: torch.optim.Optimizer | None = None,
    ) -> None:
        assert adjust_lr in ("original", "match_rms")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "use_muon": True,
        }
        super().__init__(params, defaults)
        self.adjust_lr, self.ns_steps, self.ns_precision = adjust_lr, ns_steps, ns_precision
        self.rest = rest
        self.exchange: LayerExchange | None = None
        if rest is not None:
            for group in rest.param_groups:
                group["use_muon"] = False
            self.param_groups += rest.param_groups
            self.state.update(rest.state)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "exchange": None}

    @property
    def last_ratios(self) -> list[tuple[list[Tensor], Tensor]]:
        """The trust ratios of `rest`, where that is LAMB."""
        return getattr(self.rest, "last_ratios", [])

    def take_pieces(
        self, exchange: LayerExchange, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """From now on parameters are pieces; `sum_over_ranks` is for LAMB, as `rest`."""
        self.exchange = exchange
        if isinstance(self.rest, LayerwiseOptimizer):
            self.rest.sum_over_ranks = sum_over_ranks

    def _share(self) -> None:
        """Groups and state are one set; loading puts others in their place."""
        if self.rest is not None:
            self.rest.param_groups = [g for g in self.param_groups if not g["use_muon"]]
            self.rest.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient. Returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["use_muon"] and params:
                work.append((group, params, self._directions(params, group)))
        directions = [u for *_, found in work for u in found]
        if self.exchange is None:
            shapes = [u.shape for u in directions]
            steps = self._orthogonal(directions)
        else:
            shapes = self.exchange.shapes()
            assert len(shapes) == len(directions), "every piece has a gradient"
            steps = self.exchange.scatter(self._orthogonal(self.exchange.gather(directions)))
        scales = [adjusted(shape, self.adjust_lr) for shape in shapes]
        start = 0
        for group, params, _ in work:
            stop = start + len(params)
            _descend(params, steps[start:stop], scales[start:stop], group)
            start = stop
        if self.rest is not None:
            self._share()
            self.rest.step()
        return loss

    def _directions(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """u of each parameter; advances the momentum by one step."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = new_state(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [g.to(v.dtype) for g, v in zip(gradients(params, buffers), buffers, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1.0 - group["momentum"])
        if group["nesterov"]:
            return list(torch._foreach_lerp(grads, buffers, group["momentum"]))
        return buffers

    def _orthogonal(self, tensors: list[Tensor]) -> list[Tensor]:
        """Each tensor [out, ...] made orthogonal as a matrix [out, rest], in its own shape."""
        batches: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, t in enumerate(tensors):
            rows, columns = matrix_shape(t.shape)
            batches[(min(rows, columns), max(rows, columns), t.device, t.dtype)].append(number)
        found: list[Tensor] = list(tensors)
        for numbers in batches.values():
            matrices = [tensors[n].flatten(1) for n in numbers]
            wide = torch.stack([m.mT if m.shape[0] > m.shape[1] else m for m in matrices])
            made = orthogonalise(wide, self.ns_steps, self.ns_precision)
            for n, m, o in zip(numbers, matrices, made, strict=True):
                found[n] = (o.mT if m.shape[0] > m.shape[1] else o).reshape(tensors[n].shape)
        return found


def orthogonalise(x: Tensor, steps: int, precision: str) -> Tensor:
    """U V^T, roughly, of matrices U S V^T, [n, rows, columns], rows <= columns, in x's dtype.

    `steps` times x = (a + b x x^T + c (x x^T)^2) x, from x divided by its Frobenius norm (Jordan et
    al. 2024); a matrix of zeros stays one. `precision` fp32 is the dtype of x, bf16 bfloat16.

    Of matrices twice as wide as high the same polynomial is multiplied out on the small side: all
    that it needs of x is x x^T (called Gram Newton-Schulz in pytorch_optimizer 4.1). Rounding grows
    12-fold with each step of that, so after three of them x x^T is computed anew.
    """
    a, b, c = COEFFICIENTS
    dtype = x.dtype
    if precision == "bf16":
        x = x.bfloat16()
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=EPS)
    if x.shape[2] < 2 * x.shape[1]:
        for _ in range(steps):
            gram = torch.bmm(x, x.mT)
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, factor, x, beta=a)
        return x.to(dtype)
    for start in range(0, steps, _CHAIN):
        last = min(steps - start, _CHAIN) - 1
        gram = torch.bmm(x, x.mT)
        product = factor = _polynomial(gram)
        for _ in range(last):
            gram = torch.bmm(torch.bmm(factor, gram), factor)
            factor = _polynomial(gram)
            product = torch.bmm(factor, product)
        x = torch.bmm(product, x)
    return x.to(dtype)


def _polynomial(gram: Tensor) -> Tensor:
    """a + b y + c y^2 of symmetric matrices y."""
    a, b, c = COEFFICIENTS
    found = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    found.diagonal(dim1=1, dim2=2).add_(a)
    return found


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight [out, in, ...] as a matrix."""
    return shape[0], math.prod(shape[1:])


def work(shape: Sequence[int]) -> float:
    """Multiplications in a Newton-Schulz step of a weight of this shape, near enough."""
    rows, columns = matrix_shape(shape)
    return min(rows, columns) ** 2 * (2.0 * max(rows, columns) + min(rows, columns))


def adjusted(shape: Sequence[int], rule: str) -> float:
    """What the rate of a weight of this shape is multiplied by."""
    rows, columns = matrix_shape(shape)
    if rule == "match_rms":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _descend(
    params: list[Tensor], steps: list[Tensor], scales: list[float], group: dict[str, Any]
) -> None:
    """w = (1 - lr b) w - lr s o. Rounded once, in float32 at least, as the state is."""
    lr, decay = group["lr"], group["weight_decay"]
    wide = [p.to(state_dtype(p)) for p in params]  # the parameters themselves, unless of 16 bits
    if decay:
        torch._foreach_mul_(wide, 1.0 - lr * decay)
    if isinstance(lr, Tensor):
        moved = torch._foreach_mul(steps, scales)
        torch._foreach_mul_(moved, lr)
    else:
        moved = torch._foreach_mul(steps, [lr * scale for scale in scales])
    torch._foreach_sub_(wide, moved)
    if wide[0] is not params[0]:
        torch._foreach_copy_(params, wide)
