"""Gradient clipping, on averaged gradients: by norm, by value, adaptive."""

import torch
from torch import Tensor, nn

from bigbatch.configs.clipping import Clip, ClipAdaptive, ClipNorm, ClipValue
from bigbatch.trainers.optim.groups import classifiers


@torch.no_grad()
def clip_gradients(config: Clip, model: nn.Module, norm: Tensor) -> None:
    """Clip the gradients of `model` in place; `norm` is their global L2 norm.

    Nothing is read back from the device.
    """
    match config:
        case ClipNorm():
            nn.utils.clip_grads_with_norm_(model.parameters(), config.limit, norm)
        case ClipValue():
            nn.utils.clip_grad_value_(model.parameters(), config.limit)
        case ClipAdaptive():
            # The classifier is left alone, as the paper advises (section 4.1).
            skipped = {p for module in classifiers(model) for p in module.parameters()}
            for p in model.parameters():
                if p.grad is not None and p not in skipped:
                    clip_units(p.grad, p, config.limit, config.eps)


def clip_units(gradient: Tensor, weight: Tensor, limit: float, eps: float) -> None:
    """g_i <- g_i min(1, limit max(|w_i|, eps) / |g_i|), for each unit i, in place.

    A unit is an output row of a weight [out, ...]: a neuron or a channel; a vector is one
    unit (Brock et al. 2021, arXiv:2102.06171, eq. 3).
    """
    largest = _unit_norm(weight).clamp_(min=eps).mul_(limit)
    gradient.mul_((largest / _unit_norm(gradient)).clamp_(max=1.0))  # |g| = 0: infinity, so 1


def _unit_norm(x: Tensor) -> Tensor:
    if x.ndim <= 1:
        return torch.linalg.vector_norm(x)
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
