"""LARS: layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, algorithm 1)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigbatch.trainers.optim.layerwise import as_state, by_kind, norms, ratio_or_one, state_of


class LARS(Optimizer):
    """SGD with momentum whose rate is scaled in each layer by its trust ratio.

    For a layer with weights w and gradient g, and decay b:

        ratio = trust_coefficient |w| / (|g| + b |w| + eps)       1 where |w| or |g| is 0
        lr_inside:   v = momentum v + lr ratio (g + b w);   w -= v
        lr_outside:  v = momentum v + ratio (g + b w);      w -= lr v

    With `nesterov` the step is momentum v + (what was added to v). With `trust_clip` the
    effective rate lr ratio is at most lr (LARC). Groups with adapt=False take ratio 1.
    State: momentum_buffer, fp32 for half-precision parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        momentum_form: str = "lr_inside",
        trust_clip: bool = False,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "momentum_form": momentum_form,
            "trust_clip": trust_clip,
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
        velocity, _ = state_of(self, parameters, "momentum_buffer")
        decay, momentum = group["weight_decay"], group["momentum"]

        update = torch._foreach_add(gradients, weights, alpha=decay) if decay else gradients
        if group["adapt"]:
            ratio = self.trust_ratio(group, norms(weights), norms(gradients))
            update = torch._foreach_mul(update, list(ratio.unbind()))
        inside = group["momentum_form"] == "lr_inside"
        if inside:
            update = torch._foreach_mul(update, group["lr"])
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, update)
        step: Sequence[Tensor] = velocity
        if group["nesterov"]:
            step = torch._foreach_add(update, velocity, alpha=momentum)
        if inside:
            torch._foreach_sub_(weights, step)
        else:
            torch._foreach_sub_(weights, torch._foreach_mul(step, group["lr"]))
        if weights[0].dtype != parameters[0].dtype:
            torch._foreach_copy_([p.data for p in parameters], weights)

    @staticmethod
    def trust_ratio(group: dict[str, Any], weight: Tensor, gradient: Tensor) -> Tensor:
        """The trust ratio of each layer from the norms of weights and gradients [layers]."""
        bottom = gradient + group["weight_decay"] * weight + group["eps"]
        ratio = ratio_or_one(
            group["trust_coefficient"] * weight, bottom, (weight > 0) & (gradient > 0)
        )
        return ratio.clamp(max=1.0) if group["trust_clip"] else ratio
