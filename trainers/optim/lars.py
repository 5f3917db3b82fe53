"""LARS: layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv:1708.03888)."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigbatch.trainers.optim.layerwise import (
    LayerwiseOptimizer,
    gradients,
    new_state,
    on_cpu,
    positive_or_one,
    same_memory,
    upcast,
)

if TYPE_CHECKING:
    from bigbatch.trainers.optim.gpu import Tables


class LARS(LayerwiseOptimizer):
    """SGD whose rate for each layer is scaled by the layer's trust ratio.

    With weights w, gradient g, momentum m, decay b, trust coefficient c (algorithm 1):

        d = g + b w
        r = c |w| / (|g| + b |w| + eps);   r = 1 where |w| = 0 or |g| = 0
        lr_inside:   v = m v + lr r d;   w = w - v              (You et al.; MLPerf)
        lr_outside:  v = m v + r d;      w = w - lr v           (torch's form of SGD)

    The forms differ where the learning rate changes: lr_inside remembers old rates.
    Nesterov subtracts (lr) r d + m v instead of v. `trust_clip` makes r = min(r / lr, 1),
    so that the rate of no layer exceeds lr (LARC, as in NVIDIA's apex).

    Groups with `adapt=False` take r = 1. State: `momentum_buffer`, float32 at least; it
    starts at zero, so the first step is scaled like every other. `lr` may be a float or a
    0-dim tensor; nothing is read back from a GPU, so a step can be captured in a graph.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        momentum_form: str = "lr_inside",
        trust_clip: bool = False,
    ) -> None:
        assert momentum_form in ("lr_inside", "lr_outside")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "momentum_form": momentum_form,
            "trust_clip": trust_clip,
            "adapt": True,
        }
        super().__init__(params, defaults)

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": new_state(p)}

    def vectors(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return gradients(params, [self.state[p]["momentum_buffer"] for p in params])

    def update(
        self,
        params: list[Tensor],
        vectors: list[Tensor],
        lengths: tuple[Tensor, Tensor] | None,
        group: dict[str, Any],
    ) -> None:
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        ratios = None
        if lengths is not None:
            ratios = _trust_ratios(*lengths, group)
            self.last_ratios.append((params, ratios))
        # Without momentum the kernel has no dampening, which carries the rate.
        if on_cpu(params) and group["momentum"] != 0 and same_memory(params, buffers):
            _fused_update(params, vectors, buffers, ratios, group)
        else:
            _foreach_update(params, vectors, buffers, ratios, group)

    def measure(self, params: list[Tensor], group: dict[str, Any]) -> tuple[Any, Tensor]:
        grads = self.vectors(params, group)
        tables = self._tables_of(params, grads)
        if tables is None:
            return super().measure(params, group)
        return (tables, grads), tables.lars_squares()  # gradients laid out anew must live on

    def finish(
        self, params: list[Tensor], measured: Any, squares: Tensor, group: dict[str, Any]
    ) -> None:
        if isinstance(measured, list):
            super().finish(params, measured, squares, group)
        else:
            tables, _ = measured
            self.last_ratios.append((params, tables.lars_update(squares, group)))

    def update_unadapted(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = self.vectors(params, group)
        tables = self._tables_of(params, grads)
        if tables is None:
            self.update(params, grads, None, group)
        else:
            tables.lars_update(None, group)

    def _tables_of(self, params: list[Tensor], grads: list[Tensor]) -> "Tables | None":
        return self.tables(params, grads, [self.state[p]["momentum_buffer"] for p in params])


def _trust_ratios(w: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
    """r of each layer from the norms of its weights and gradient, all of shape [layers]."""
    ratios = group["trust_coefficient"] * w / (g + group["weight_decay"] * w + group["eps"])
    if group["trust_clip"]:
        ratios = (ratios / group["lr"]).clamp(max=1.0)
    return positive_or_one(ratios, w, g)


def _foreach_update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    ratios: Tensor | None,
    group: dict[str, Any],
) -> None:
    """The update in multi-tensor operations, for any device and dtype; one extra buffer."""
    lr, momentum = group["lr"], group["momentum"]
    inside = group["momentum_form"] == "lr_inside"
    # In float32 before anything is added: bf16 would round the decay away.
    delta = torch._foreach_add(upcast(grads), upcast(params), alpha=group["weight_decay"])
    if ratios is not None:
        torch._foreach_mul_(delta, list((ratios * lr if inside else ratios).unbind()))
    elif inside:
        torch._foreach_mul_(delta, lr)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, delta)
    if group["nesterov"]:
        torch._foreach_add_(delta, buffers, alpha=momentum)
    else:
        torch._foreach_copy_(delta, buffers)
    if not inside:
        torch._foreach_mul_(delta, lr)
    torch._foreach_sub_(params, delta)


def _fused_update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    ratios: Tensor | None,
    group: dict[str, Any],
) -> None:
    """The same on a CPU, in one pass over memory, with torch's fused SGD kernel.

    The kernel computes v = m v + (1 - dampening) (g + b w), w = w - lr v: its dampening
    carries the rate of the layer, and rounding that moves the update by at most 1.1e-16 |d|.
    """
    decay, momentum, lr = group["weight_decay"], group["momentum"], float(group["lr"])
    inside, outside = (lr, 1.0) if group["momentum_form"] == "lr_inside" else (1.0, lr)
    if ratios is None:
        work = [(params, grads, buffers, inside)]
    else:  # reading back costs nothing on a CPU
        scales = [inside * ratio for ratio in ratios.tolist()]
        work = [
            ([p], [g], [v], s) for p, g, v, s in zip(params, grads, buffers, scales, strict=True)
        ]
    for p, g, v, scale in work:
        kept, rate = momentum, outside
        if group["nesterov"]:
            # s d + m v' = (1 + m) v' - m v, where v is the old buffer. Its part goes first;
            # the kernel's decay then sees it in w, so the momentum makes up for that.
            torch._foreach_add_(p, v, alpha=outside * momentum)
            kept = momentum * (1.0 - scale * decay * outside)
            rate = outside * (1.0 + momentum)
        torch._fused_sgd_(
            p,
            g,
            v,
            weight_decay=decay,
            momentum=kept,
            lr=rate,
            dampening=1.0 - scale,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
