"""Normalisation in place of BatchNorm, and of what goes into a classifier. docs/craft.md.

Every layer here computes each micro-batch by itself, so that ranks do not matter; those with
running statistics are BatchNorms, whose statistics `batch_stats.py` blends once a step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.layers.filter_response_norm import FilterResponseNormTlu2d
from torch import Tensor, nn


class _Fused(nn.Module):
    """Behind the norm of the next class: what timm's BatchNormAct2d does behind its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.drop(super().forward(x)))
        return found


class Group(_Fused, nn.GroupNorm):
    pass


class Layer(_Fused, LayerNorm2d):
    pass


class Instance(_Fused, nn.InstanceNorm2d):
    pass


class _FilterResponse(FilterResponseNormTlu2d):
    """x / sqrt(mean of x^2 over the map + eps), scaled and shifted, and with `apply_act` the
    larger of that and a learned threshold tau (arXiv:1911.09737, equations 1 to 3)."""

    def forward(self, x: Tensor) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = precise.square().mean((2, 3), keepdim=True)
        y = precise * (mean + self.eps).rsqrt() * self.weight.view(-1, 1, 1)
        y = y + self.bias.view(-1, 1, 1)
        if self.tau is not None:
            y = torch.maximum(y, self.tau.view(-1, 1, 1))
        return y.to(x.dtype)


class FilterResponse(_Fused, _FilterResponse):
    pass


class LocalResponse(_Fused, nn.LocalResponseNorm):
    pass


class _Ghost(nn.BatchNorm2d):
    """BatchNorm over `samples` consecutive images; the last ghost batch may be shorter.

    Its running statistics move by `momentum` towards the mean of the ghost batches' means, and of
    their unbiased variances.
    """

    samples: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        means, variances, parts = [], [], []
        for part in x.split(self.samples):
            mean, variance = self.weight.new_zeros(2, x.shape[1])
            parts.append(
                F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            )
            means.append(mean)
            variances.append(variance)
        _blend(self, torch.stack(means).mean(0), torch.stack(variances).mean(0))
        return torch.cat(parts)


class GhostBatch(_Fused, _Ghost):
    pass


class _Renorm(nn.BatchNorm2d):
    """Batch renormalisation (arXiv:1702.03275, algorithm 1), by torch's running variance.

    y = weight * ((x - mean_B) / std_B * r + d) + bias, where r = std_B / std, within
    [1 / r_max, r_max], and d = (mean_B - mean) / std, within [-d_max, d_max], are constants for
    the gradient. std_B is over the biased variance, std over the running one, each with eps.
    `reference` is the mean, the variance and the number of finished steps before the step, the
    same for all its micro-batches; without it, as when statistics are computed anew, r = 1 and
    d = 0.
    """

    r_max: float
    d_max: float
    ramp_steps: int
    reference: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        if self.reference is not None:
            r, d = self._corrections(mean, variance, *self.reference)
            weight, bias = weight * r, bias + weight * d
        _blend(self, mean, variance * (count / max(1, count - 1)))
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)

    @torch.no_grad()
    def _corrections(
        self, mean: Tensor, variance: Tensor, before: Tensor, spread: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        share = (steps / self.ramp_steps).clamp(max=1.0) if self.ramp_steps else 1.0
        r_max = torch.ones_like(mean) + share * (self.r_max - 1)
        d_max = torch.zeros_like(mean) + share * self.d_max
        std = (spread + self.eps).sqrt()
        r, d = (variance + self.eps).sqrt() / std, (mean - before) / std
        return r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)


class BatchRenorm(_Fused, _Renorm):
    pass


class _Frozen(nn.BatchNorm2d):
    """BatchNorm by its running statistics in training, too: `train()` does not thaw it."""

    def train(self, mode: bool = True) -> "_Frozen":
        return super().train(False)


class FrozenBatch(_Fused, _Frozen):
    pass


@torch.no_grad()
def _blend(layer: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move a layer's running statistics as torch's BatchNorm does."""
    statistics: Any = layer
    statistics.num_batches_tracked.add_(1)
    statistics.running_mean.lerp_(mean.to(statistics.running_mean), statistics.momentum)
    statistics.running_var.lerp_(variance.to(statistics.running_var), statistics.momentum)


class StandardizedConv2d(nn.Conv2d):
    """A convolution by w' = (w - mean) / sqrt(var + eps), over the inputs of each output.

    Qiao et al. 2019, arXiv:1903.10520, equations 8 and 9; the variance is biased, as timm's.
    """

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * (variance + self.eps).rsqrt()
        return self._conv_forward(x, weight, self.bias)


class UnitLength(nn.Module):
    """Features [B, F] of length `scale` each (Ranjan et al. 2017, arXiv:1703.09507, equation 3)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features)


class NormedLinear(nn.Linear):
    """A linear classifier of what `norm` makes of features [B, F]."""

    norm: nn.Module

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.norm(features))


class CosineLinear(nn.Linear):
    """Logits [B, C]: `scale` times the cosine of features and each class's weights."""

    norm: nn.Module
    scale: float

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(self.norm(features)), F.normalize(self.weight))
