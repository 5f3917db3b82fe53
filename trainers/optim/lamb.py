"""LAMB: layer-wise adaptive moments (You et al. 2020, algorithm 2)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from bigbatch.trainers.optim.layerwise import as_state, by_kind, norms, ratio_or_one, state_of


class LAMB(Optimizer):
    """Adam's step, decoupled decay added, rescaled in each layer to the size of its weights.

        m = beta1 m + (1 - beta1) g;   s = beta2 s + (1 - beta2) g^2
        u = m' / (sqrt(s') + eps) + b w          m', s' bias-corrected where asked for
        w -= lr |w| / |u| u                      ratio 1 where |w| or |u| is 0

    `trust_bounds` clips the ratio |w| / |u|. Groups with adapt=False take ratio 1. State:
    exp_avg, exp_avg_sq (fp32 for half-precision parameters) and step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        trust_bounds: tuple[float, float] | None = None,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "trust_bounds": trust_bounds,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in by_kind(group):
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
        weights = as_state([p.data for p in parameters])
        gradients = as_state([p.grad for p in parameters if p.grad is not None])
        mean, _ = state_of(self, parameters, "exp_avg")
        square, _ = state_of(self, parameters, "exp_avg_sq")
        for p in parameters:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        counts = [self.state[p]["step"] for p in parameters]
        torch._foreach_add_(counts, 1)
        beta1, beta2 = group["betas"]

        torch._foreach_lerp_(mean, gradients, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - beta2)

        bottom = torch._foreach_sqrt(square)
        if group["bias_correction"]:
            # All parameters of a group have taken the same number of steps.
            steps = counts[0].double()
            torch._foreach_mul_(bottom, (1 / (1 - beta2**steps).sqrt()).to(bottom[0].dtype))
            scale = (1 / (1 - beta1**steps)).to(bottom[0].dtype)
        else:
            scale = torch.ones((), dtype=bottom[0].dtype, device=bottom[0].device)
        torch._foreach_add_(bottom, group["eps"])
        update = torch._foreach_div(mean, bottom)
        torch._foreach_mul_(update, scale)
        if group["weight_decay"]:
            torch._foreach_add_(update, weights, alpha=group["weight_decay"])
        if group["adapt"]:
            w, u = norms(weights), norms(update)
            ratio = ratio_or_one(w, u, (w > 0) & (u > 0))
            if group["trust_bounds"] is not None:
                ratio = ratio.clamp(*group["trust_bounds"])
            torch._foreach_mul_(update, list(ratio.unbind()))
        torch._foreach_mul_(update, group["lr"])
        torch._foreach_sub_(weights, update)
        if weights[0].dtype != parameters[0].dtype:
            torch._foreach_copy_([p.data for p in parameters], weights)
