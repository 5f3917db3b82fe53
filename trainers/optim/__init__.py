"""Optimizers: LARS and LAMB of our own, all others from torch.optim."""

from bigbatch.trainers.optim.build import build_optimizer, parameter_groups, set_lr
from bigbatch.trainers.optim.lamb import LAMB
from bigbatch.trainers.optim.lars import LARS
from bigbatch.trainers.optim.state import load_optimizer_state, optimizer_state_by_name

__all__ = [
    "LAMB",
    "LARS",
    "build_optimizer",
    "load_optimizer_state",
    "optimizer_state_by_name",
    "parameter_groups",
    "set_lr",
]
