"""Losses that ask the target's logit for a margin, of one label for each image.

Logits and weights of labels are [B, C], as in classification.py, with one weight in a row that
is not 0; what comes back is [B].
"""

import math

import torch
from torch import Tensor

from bigbatch.trainers.losses.classification import cross_entropy


def ldam(logits: Tensor, weights: Tensor, margins: Tensor) -> Tensor:
    """Cross-entropy with the label's logit lowered by its class's margin [C].

    Cao et al. 2019, "Learning imbalanced datasets with label-distribution-aware margin loss",
    equation 13.
    """
    return cross_entropy(logits - margins * (weights > 0), weights)


def arcface(logits: Tensor, weights: Tensor, scale: float, margin: float) -> Tensor:
    """Cross-entropy where the label's scale cos(a) becomes scale cos(a + margin).

    Deng et al. 2019, "ArcFace", equation 3. Beyond a = pi - margin, where that would rise again, it
    goes on as cos(a) - margin sin(margin), as in the authors' code (deepinsight/insightface).
    """
    cosine = logits / scale
    sine = (1 - cosine**2).clamp(min=torch.finfo(logits.dtype).eps).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    straight = cosine - margin * math.sin(margin)
    wider = torch.where(cosine > math.cos(math.pi - margin), turned, straight)
    return cross_entropy(torch.where(weights > 0, scale * wider, logits), weights)


def cosface(logits: Tensor, weights: Tensor, scale: float, margin: float) -> Tensor:
    """Cross-entropy with the label's cosine lowered (Wang et al. 2018, "CosFace", equation 4)."""
    return cross_entropy(torch.where(weights > 0, logits - scale * margin, logits), weights)


def large_margin(
    logits: Tensor,
    weights: Tensor,
    lengths: Tensor,
    bias: Tensor | None,
    margin: int,
    plain_share: float,
) -> Tensor:
    """Cross-entropy where the label's |w| |x| cos(a) becomes |w| |x| psi(a).

    Liu et al. 2016, "Large-margin softmax loss", equations 4 to 6: psi(a) = (-1)^k cos(m a) - 2k
    for a in [k pi / m, (k + 1) pi / m]. `lengths` [B, C] are |w| |x| of the classifier whose
    logits these are, and `bias` [C] its bias, which stays outside of the margin.
    """
    shift = logits.new_zeros(logits.shape[1]) if bias is None else bias
    cosine = (logits - shift) / lengths.clamp(min=torch.finfo(logits.dtype).tiny)
    narrowed = plain_share * cosine + (1 - plain_share) * _psi(cosine, margin)
    return cross_entropy(torch.where(weights > 0, lengths * narrowed + shift, logits), weights)


def _psi(cosine: Tensor, margin: int) -> Tensor:
    """psi of the angle, from its cosine alone: the angle's own gradient is infinite at 0."""
    multiple = {
        1: lambda c: c,
        2: lambda c: 2 * c**2 - 1,
        3: lambda c: 4 * c**3 - 3 * c,
        4: lambda c: 8 * c**4 - 8 * c**2 + 1,
    }[margin](cosine)
    bounds = [math.cos(j * math.pi / margin) for j in range(1, margin)]
    k = sum((cosine < bound).to(cosine) for bound in bounds)
    return (1 - 2 * (k % 2)) * multiple - 2 * k
