"""Images mixed with others of their micro-batch."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bigbatch.configs.augment import Augment
from bigbatch.data.augment.operation import Draws, Mixing


def operations(augment: Augment) -> list[Mixing]:
    """What the recipe asks for, in the order in which it is done."""
    found = []
    if augment.mixup > 0:
        found.append(Mixing("mixup", partial(mixup, alpha=augment.mixup)))
    return found


def mixup(images: Tensor, targets: Tensor, draws: Draws, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) within the micro-batch, with one weight per image."""
    count = len(images)
    # A name of its own, from before operations had any: other partners would be other weights.
    partner = torch.from_numpy(np.argsort(replace(draws, name="partner").uniforms(count)))
    weight = torch.from_numpy(draws.generator().beta(alpha, alpha, count).astype(np.float32))
    partner = partner.to(images.device, non_blocking=True)
    weight = weight.to(images.device, non_blocking=True)[:, None]
    mixed_targets = weight * targets + (1 - weight) * targets[partner]
    weight = weight[:, :, None, None]
    return weight * images + (1 - weight) * images[partner], mixed_targets
