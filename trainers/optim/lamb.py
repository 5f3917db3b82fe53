"""LAMB: layer-wise adaptive moments (You et al. 2020, arXiv:1904.00962)."""

from typing import Any

import torch
from torch import Tensor

from bigbatch.trainers.optim.layerwise import (
    LayerwiseOptimizer,
    buckets,
    gradients,
    new_state,
    norms,
    upcast,
    where_positive,
)


class LAMB(LayerwiseOptimizer):
    r"""AdamW whose step for each layer has the length of the layer's weights.

    With weights w, gradient g, decay b (algorithm 2):

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
        u = m' / (sqrt(v') + eps) + b w
        r = |w| / |u|, clamped to trust_bounds;   r = 1 where |w| = 0 or |u| = 0
        w = w - lr r u

    m' = m / (1 - b1^t) and v' = v / (1 - b2^t) with `bias_correction`, else m and v.
    Groups with `adapt=False` take r = 1. State: `exp_avg`, `exp_avg_sq`, float32 at least,
    and `step`. `lr` may be a float or a 0-dim tensor; nothing is read back from a GPU, so
    that a step can be captured in a graph.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        trust_bounds: tuple[float, float] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "trust_bounds": trust_bounds,
            "adapt": True,
            "capturable": True,  # torch's sign that `step` lives on the parameter's device
        }
        super().__init__(params, defaults)

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": new_state(p),
            "exp_avg_sq": new_state(p),
        }

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for bucket in buckets(params):
            direction = self._direction(bucket, group)
            if group["adapt"]:
                w, u = norms(bucket), norms(direction)
                ratios = w / u
                if group["trust_bounds"] is not None:
                    ratios = ratios.clamp(*group["trust_bounds"])
                ratios = where_positive(ratios, w, u)
                self.last_ratios.append((bucket, ratios))
                torch._foreach_mul_(direction, list((ratios * group["lr"]).unbind()))
            else:
                torch._foreach_mul_(direction, group["lr"])
            torch._foreach_sub_(bucket, direction)

    def _direction(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """u of each parameter, in new buffers; advances the moments by one step.

        torch's fused AdamW kernel does the work: started from b w instead of the weights,
        with rate -1 and no decay of its own, it leaves exactly u.
        """
        states = [self.state[p] for p in params]
        direction = list(torch._foreach_mul(upcast(params), group["weight_decay"]))
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        if not group["bias_correction"]:
            steps = [torch.full_like(t, torch.inf) for t in steps]  # 1 - beta^inf = 1
        torch._fused_adamw_(
            direction,
            upcast(gradients(params)),
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            steps,
            lr=-1.0,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        return direction
