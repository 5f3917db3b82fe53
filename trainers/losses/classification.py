"""Losses of a classifier, each a function of logits and of weights of labels, both [B, C].

The weight v[i, c] says how much the label c counts for sample i: 1 for its label, the shares of
mixed ones, times the weights of classes. Every loss is linear in v: that of a mixed sample is the
mean of its labels' losses by their shares, as mixup has it (Zhang et al. 2018, section 2). What
comes back is [B], so that a mean over samples does not depend on how they are batched.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.configs.errors import UserError


def smoothed(weights: Tensor, smoothing: float) -> Tensor:
    """A share of each sample's weight, spread over all classes (Szegedy et al. 2016, section 7).

    After weights of classes, not before: torch weighs the spread share by the classes it falls
    on, so that a rare class's weight makes it the answer for every other one (pytorch #104776).
    """
    total = weights.sum(1, keepdim=True)
    return (1 - smoothing) * weights + smoothing / weights.shape[1] * total


def cross_entropy(logits: Tensor, weights: Tensor) -> Tensor:
    return -(weights * F.log_softmax(logits, 1)).sum(1)


def poly1(logits: Tensor, weights: Tensor, epsilon: float) -> Tensor:
    """Cross-entropy + epsilon (1 - p), p the target's probability."""
    missed = weights.sum(1) - (weights * logits.softmax(1)).sum(1)
    return cross_entropy(logits, weights) + epsilon * missed


def bce(logits: Tensor, weights: Tensor, pos_weight: float, over_classes: str) -> Tensor:
    """Binary cross-entropy of each class, added up or averaged over classes."""
    return _each_class(weights, pos_weight * F.softplus(-logits), F.softplus(logits), over_classes)


def bce_above(
    logits: Tensor, weights: Tensor, threshold: float, pos_weight: float, over_classes: str
) -> Tensor:
    """The same with shares above `threshold` as 1, others as 0, as timm's target_threshold.

    Not linear in v, which has to be the targets themselves.
    """
    there = (weights > threshold).to(logits)
    yes, no = pos_weight * F.softplus(-logits), F.softplus(logits)
    per_class = there * yes + (1 - there) * no
    return per_class.mean(1) if over_classes == "mean" else per_class.sum(1)


def focal_sigmoid(logits: Tensor, weights: Tensor, gamma: float, alpha: float | None) -> Tensor:
    """Binary cross-entropy of each class times (1 - its probability)^gamma, added up."""
    yes = _power(torch.sigmoid(-logits), gamma) * F.softplus(-logits)
    no = _power(torch.sigmoid(logits), gamma) * F.softplus(logits)
    if alpha is not None:
        yes, no = alpha * yes, (1 - alpha) * no
    return _each_class(weights, yes, no, "sum")


def focal_softmax(logits: Tensor, weights: Tensor, gamma: float) -> Tensor:
    log_p = F.log_softmax(logits, 1)
    return -(weights * _power(-torch.expm1(log_p), gamma) * log_p).sum(1)


def hinge(logits: Tensor, weights: Tensor, margin: float) -> Tensor:
    """Crammer and Singer's: max(0, margin + the largest other logit - the label's)."""
    return (weights * (margin - _lead(logits)).clamp(min=0)).sum(1)


def ramp(logits: Tensor, weights: Tensor, s: float) -> Tensor:
    """H_1 - H_s of the lead z, H_a(z) = max(0, a - z): the hinge up to 1 - s."""
    return (weights * (1 - _lead(logits)).clamp(min=0, max=1 - s)).sum(1)


def expected_cost(logits: Tensor, weights: Tensor, costs: Tensor) -> Tensor:
    """sum over labels c and answers k of v_c costs[c, k] p_k."""
    return ((weights @ costs) * logits.softmax(1)).sum(1)


def jsd(logits: Tensor, weights: Tensor, factor: float) -> Tensor:
    """Cross-entropy of the first of three views + factor times their Jensen-Shannon divergence.

    Logits [3B, C] are of all first views, all second, all third; weights of labels [B, C].
    Hendrycks et al. 2020, equations 2 and 3: JS is the mean over views of KL(p_i, their mean).
    """
    first, *_ = logits.tensor_split(3)
    log_p = F.log_softmax(logits.view(3, *first.shape), 2)
    log_mean = log_p.logsumexp(0) - math.log(3)
    divergence = (log_p.exp() * (log_p - log_mean)).sum(2).mean(0)
    return cross_entropy(first, weights) + factor * divergence


def _each_class(weights: Tensor, yes: Tensor, no: Tensor, over_classes: str) -> Tensor:
    """A label says yes to its class and no to all others, [B]."""
    per_class = weights * yes + (weights.sum(1, keepdim=True) - weights) * no
    return per_class.mean(1) if over_classes == "mean" else per_class.sum(1)


def _lead(logits: Tensor) -> Tensor:
    """By how much each class's logit is above the largest other one, [B, C]."""
    if logits.shape[1] < 2:
        raise UserError("this loss compares classes, and the data has one; take cross_entropy")
    values, places = logits.topk(2, 1)
    first, second = values.split(1, 1)
    others = first.expand_as(logits).scatter(1, places[:, :1], second)
    return logits - others


def _power(base: Tensor, exponent: float) -> Tensor:
    """base^exponent; at a base of 0 its gradient is 0, where exponents below 1 have no other."""
    return base.clamp(min=torch.finfo(base.dtype).tiny).pow(exponent)
