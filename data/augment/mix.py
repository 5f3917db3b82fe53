"""Images mixed with others of their micro-batch."""

import numpy as np
import torch
from torch import Tensor

from bigbatch.data.rng import key64, uniforms


def mixup(images: Tensor, targets: Tensor, alpha: float, *key: int | str) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) within the micro-batch, with one weight per image."""
    count = len(images)
    partner = torch.from_numpy(np.argsort(uniforms((count,), *key, "partner")))
    generator = np.random.Generator(np.random.Philox(key=key64(*key, "mixup")))
    weight = torch.from_numpy(generator.beta(alpha, alpha, count).astype(np.float32))
    partner = partner.to(images.device, non_blocking=True)
    weight = weight.to(images.device, non_blocking=True)[:, None]
    mixed_targets = weight * targets + (1 - weight) * targets[partner]
    weight = weight[:, :, None, None]
    return weight * images + (1 - weight) * images[partner], mixed_targets
