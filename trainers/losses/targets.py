"""Losses of numbers and of distributions: functions of outputs and targets [B, K], to [B].

Numbers are standardised (configs/targets.py), so that errors are in standard deviations of the
target; a sample's loss is the mean over its K targets. Each is a function of the target that mixup
mixed, as of any other one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_SCALE = 1e-3  # standard deviations of the target: of smaller errors all are good
_TO_SIGMA = 1.4826  # of normal errors, the standard deviation over the median absolute deviation


def l1(outputs: Tensor, targets: Tensor) -> Tensor:
    return _errors(outputs, targets).abs().mean(1)


def l2(outputs: Tensor, targets: Tensor) -> Tensor:
    return _errors(outputs, targets).square().mean(1)


def smooth_l1(outputs: Tensor, targets: Tensor, beta: float) -> Tensor:
    """error^2 / (2 beta) up to beta, |error| - beta / 2 beyond, as torch's (Girshick 2015)."""
    size = _errors(outputs, targets).abs()
    return torch.where(size < beta, size.square() / (2 * beta), size - beta / 2).mean(1)


def tukey(outputs: Tensor, targets: Tensor, c: float, scale: float | None) -> Tensor:
    """c^2 / 6 (1 - (1 - (r / c)^2)^3) up to c, c^2 / 6 beyond (Belagiannis et al. 2015, 3 to 6).

    r is the error over `scale`, by default over the batch's robust deviation, [K].
    """
    errors = _errors(outputs, targets)
    r = errors / (robust_deviation(errors.detach()) if scale is None else scale)
    left = (1 - (r / c).square()).clamp(min=0)
    return (c**2 / 6 * (1 - left**3)).mean(1)


def robust_deviation(errors: Tensor) -> Tensor:
    """1.4826 times the median absolute deviation from the median over the batch, [K]."""
    deviations = (errors - errors.quantile(0.5, 0)).abs()
    return (_TO_SIGMA * deviations.quantile(0.5, 0)).clamp(min=_LEAST_SCALE)


def kl(logits: Tensor, shares: Tensor) -> Tensor:
    """sum over classes of t log(t / p), p the softmax of logits; 0 log 0 is 0."""
    log_p = F.log_softmax(_precise(logits), 1)
    return (torch.special.xlogy(shares, shares) - shares * log_p).sum(1)


def _errors(outputs: Tensor, targets: Tensor) -> Tensor:
    return _precise(outputs) - targets


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
