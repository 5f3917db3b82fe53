"""LARS: layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv:1708.03888)."""

from typing import Any

import torch
from torch import Tensor

from bigbatch.trainers.optim.layerwise import (
    LayerwiseOptimizer,
    buckets,
    gradients,
    new_state,
    norms,
    state_dtype,
    upcast,
    where_positive,
)


class LARS(LayerwiseOptimizer):
    r"""SGD whose rate for each layer is scaled by the trust ratio.

    With weights w, gradient g, momentum m, decay b, trust coefficient c (algorithm 1):

        d = g + b w
        r = c |w| / (|g| + b |w| + eps);   r = 1 where |w| = 0 or |g| = 0
        lr_inside:   v = m v + lr r d;   w = w - v              (You et al.; MLPerf)
        lr_outside:  v = m v + r d;      w = w - lr v           (torch's form of SGD)

    The forms differ where the learning rate changes: lr_inside remembers old rates.
    Nesterov replaces v in the last line by (lr) r d + m v. `trust_clip` makes
    r = min(r / lr, 1), so that the rate of no layer exceeds lr (LARC, NVIDIA apex).

    Groups with `adapt=False` take r = 1. State: `momentum_buffer`, float32 at least; it
    starts at zero, so the first step is scaled like every other. `lr` may be a float or a
    0-dim tensor; nothing is read back from a GPU, so that a step can be captured in a graph.
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

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for bucket in buckets(params):
            grads = gradients(bucket)
            buffers = [self.state[p]["momentum_buffer"] for p in bucket]
            ratios = None
            if group["adapt"]:
                ratios = self._trust_ratios(bucket, grads, group)
                self.last_ratios.append((bucket, ratios))
            if _fused(bucket[0], group):
                _fused_update(bucket, grads, buffers, ratios, group)
            else:
                _foreach_update(bucket, grads, buffers, ratios, group)

    def _trust_ratios(self, params: list[Tensor], grads: list[Tensor], group: Any) -> Tensor:
        """r of each parameter, shape [len(params)]."""
        w, g = norms(params), norms(grads)
        ratio = group["trust_coefficient"] * w / (g + group["weight_decay"] * w + group["eps"])
        if group["trust_clip"]:
            ratio = (ratio / group["lr"]).clamp(max=1.0)
        return where_positive(ratio, w, g)


def _fused(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether torch's fused CPU kernel computes this group's update."""
    # The kernel applies dampening neither to Nesterov's gradient term nor without momentum.
    plain = group["momentum"] != 0 and not group["nesterov"]
    return p.device.type == "cpu" and p.dtype == state_dtype(p) and plain


def _fused_update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    ratios: Tensor | None,
    group: dict[str, Any],
) -> None:
    """One pass over memory with torch's fused SGD kernel: v = m v + (1 - dampening) d.

    Its dampening carries the rate of the layer. Rounding 1 - rate moves the update by at
    most 1.1e-16 |d|. On a CPU reading the ratios back costs nothing.
    """
    lr = float(group["lr"])
    inside, outside = (lr, 1.0) if group["momentum_form"] == "lr_inside" else (1.0, lr)
    if ratios is None:
        work = [(params, grads, buffers, inside)]
    else:
        scales = [inside * ratio for ratio in ratios.tolist()]
        work = [
            ([p], [g], [v], s) for p, g, v, s in zip(params, grads, buffers, scales, strict=True)
        ]
    for p, g, v, scale in work:
        torch._fused_sgd_(
            p,
            g,
            v,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=outside,
            dampening=1.0 - scale,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )


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
    delta = upcast(grads)
    if group["weight_decay"]:
        delta = list(torch._foreach_add(delta, upcast(params), alpha=group["weight_decay"]))
    elif delta[0] is grads[0]:
        delta = [g.clone() for g in grads]
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
