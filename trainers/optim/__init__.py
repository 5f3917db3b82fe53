"""Optimizers: our LARS and LAMB, the rest by name, and their state by parameter name."""

from bigbatch.trainers.optim.build import build_optimizer, set_lr, set_momentum, trust_ratios
from bigbatch.trainers.optim.by_batch import set_by_batch
from bigbatch.trainers.optim.lamb import LAMB
from bigbatch.trainers.optim.lars import LARS
from bigbatch.trainers.optim.state import load_optimizer_state, optimizer_state_by_name

__all__ = [
    "LAMB",
    "LARS",
    "build_optimizer",
    "load_optimizer_state",
    "optimizer_state_by_name",
    "set_by_batch",
    "set_lr",
    "set_momentum",
    "trust_ratios",
]
