"""Monte Carlo dropout: passes that drop at random, as training does, averaged in probability.

Gal and Ghahramani 2016 (arXiv:1506.02142), section 4. What is random is whatever a model draws in
training mode: dropout of features and of attention, and stochastic depth.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.data.rng import key64
from bigbatch.trainers.models.batch_stats import averaged_layers


def let_drop(model: nn.Module) -> None:
    """Training mode, but for running statistics, which are used and stay as they are.

    Not the dropout modules alone: many models of timm drop by a function, which looks at the mode
    of the module around it.
    """
    model.train()
    for _, layer in averaged_layers(model):
        layer.eval()


def drop(forward: Callable[[], Tensor], device: torch.device, name: str, *key: int | str) -> Tensor:
    """What `forward` gives with random numbers of this key; the caller's stream stays as it is.

    UserError, which names the member, where it draws none.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.manual_seed(key64("mc-dropout", name, *key))
        before = _state(device)
        found = forward()
        if torch.equal(before, _state(device)):
            raise UserError(
                f"--mc-dropout: member {name} drops nothing in training; leave it out, or leave "
                "out --mc-dropout"
            )
    return found


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
