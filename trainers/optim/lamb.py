"""LAMB: layer-wise adaptive moments (You et al. 2020, arXiv:1904.00962)."""

from typing import Any

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


class LAMB(LayerwiseOptimizer):
    """AdamW whose step for each layer has the length of the layer's weights.

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

    def _begin(self) -> None:
        super()._begin()
        self._scratch = torch.empty(0)

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": new_state(p),
            "exp_avg_sq": new_state(p),
        }

    def update(
        self,
        params: list[Tensor],
        vectors: list[Tensor],
        lengths: tuple[Tensor, Tensor] | None,
        group: dict[str, Any],
    ) -> None:
        lr = group["lr"]
        if lengths is None:
            torch._foreach_mul_(vectors, lr)
            torch._foreach_sub_(params, vectors)
            return
        w, u = lengths
        ratios = w / u
        if group["trust_bounds"] is not None:
            ratios = ratios.clamp(*group["trust_bounds"])
        ratios = positive_or_one(ratios, w, u)
        self.last_ratios.append((params, ratios))
        if on_cpu(params):
            for p, d, ratio in zip(params, vectors, ratios.tolist(), strict=True):
                p.add_(d, alpha=-float(lr) * ratio)
        else:
            torch._foreach_mul_(vectors, list((ratios * lr).unbind()))
            torch._foreach_sub_(params, vectors)

    def measure(self, params: list[Tensor], group: dict[str, Any]) -> tuple[Any, Tensor]:
        states = [self.state[p] for p in params]
        means = [s["exp_avg"] for s in states]
        grads = gradients(params, means)
        steps = [s["step"] for s in states]
        tables = self.tables(params, grads, means, [s["exp_avg_sq"] for s in states], steps)
        if tables is None:
            return super().measure(params, group)
        torch._foreach_add_(steps, 1)
        return (tables, grads), tables.lamb_moments(group)

    def finish(
        self, params: list[Tensor], measured: Any, squares: Tensor, group: dict[str, Any]
    ) -> None:
        if isinstance(measured, list):
            super().finish(params, measured, squares, group)
        else:
            tables, _ = measured
            self.last_ratios.append((params, tables.lamb_update(squares, group)))

    def update_unadapted(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """With a ratio of 1 this is AdamW, which torch has a kernel for."""
        if same_memory(params, [self.state[p]["exp_avg"] for p in params]):
            self._adamw(params, params, group, group["lr"], group["weight_decay"])
        else:
            super().update_unadapted(params, group)

    def vectors(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """u of each parameter; advances the moments by one step.

        Started from b w in place of the weights, with rate -1 and no decay of its own,
        AdamW's kernel leaves exactly u.
        """
        means = [self.state[p]["exp_avg"] for p in params]
        direction = self._decayed(params, means, group["weight_decay"])
        self._adamw(params, direction, group, -1.0, 0.0)
        return direction

    def _adamw(
        self,
        params: list[Tensor],
        targets: list[Tensor],
        group: dict[str, Any],
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        """One step of torch's fused AdamW by the parameters' gradients and state, on `targets`."""
        states = [self.state[p] for p in params]
        means = [s["exp_avg"] for s in states]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        if not group["bias_correction"]:
            steps = [torch.full_like(steps[0], torch.inf)] * len(steps)  # 1 - beta^inf = 1
        torch._fused_adamw_(
            targets,
            upcast(gradients(params, means)),
            means,
            [s["exp_avg_sq"] for s in states],
            [],
            steps,
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=weight_decay,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _decayed(self, params: list[Tensor], like: list[Tensor], decay: float) -> list[Tensor]:
        """b w, laid out as the state is. On a CPU in one buffer that stays as large as the
        largest bucket: fresh memory would cost a page fault for every 4 kB of it."""
        if self.sum_over_ranks is not None or not on_cpu(params):
            return list(torch._foreach_mul(upcast(params), decay))
        sizes = [p.numel() for p in params]
        if self._scratch.numel() < sum(sizes) or self._scratch.dtype != like[0].dtype:
            self._scratch = torch.empty(sum(sizes), dtype=like[0].dtype)
        views = [
            part.as_strided(state.shape, state.stride())
            for part, state in zip(self._scratch[: sum(sizes)].split(sizes), like, strict=True)
        ]
        return [
            torch.mul(w, decay, out=view) for w, view in zip(upcast(params), views, strict=True)
        ]
