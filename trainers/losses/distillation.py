"""What a student loses by differing from its teacher.

Logits and the teacher's log-probabilities are [B, C]; losses are means over B. A teacher's
log-probabilities are its logits but for a constant in each row, which neither loss sees.
"""

import torch.nn.functional as F
from torch import Tensor


def soft_targets(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of distributions softened by T, summed over classes.

    Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2: gradients of
    softened distributions shrink by 1 / T^2, so the factor keeps their share beside labels. The
    teacher's entropy, which no gradient sees, is subtracted from their cross-entropy.
    """
    ours = F.log_softmax(logits / temperature, dim=1)
    theirs = F.log_softmax(taught / temperature, dim=1)
    divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def logit_regression(logits: Tensor, taught: Tensor) -> Tensor:
    """Mean over B and C of squared differences, each row's mean taken off both.

    Ba and Caruana 2014, "Do deep nets really need to be deep?", equation 1, whose logits are
    log-probabilities up to a constant. That constant says nothing of the classes.
    """
    return F.mse_loss(_centred(logits), _centred(taught))


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=1, keepdim=True)
