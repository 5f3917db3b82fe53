"""Engines: one Engine for the loop to see, whatever exchanges the gradients."""

import os

from bigbatch.trainers.engine.base import Engine
from bigbatch.trainers.engine.collectives import is_lost_peer, read_back
from bigbatch.trainers.engine.ddp import DdpEngine

__all__ = ["Engine", "is_lost_peer", "open_engine", "read_back"]


def open_engine(
    backend: str,
    precision: str,
    reduction: str = "overlapped",
    timeout_s: float = 600,
    determinism: str = "none",
) -> Engine:
    """The engine of a recipe's `backend`: ddp, zero1, zero2 or fsdp2.

    One rank has nobody to share with: it is plain training on any backend.
    """
    full = determinism == "full"
    if backend == "ddp" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return DdpEngine(precision, reduction, timeout_s, deterministic=full)
    # Imported here: deepspeed takes seconds to import.
    if backend == "fsdp2":
        from bigbatch.trainers.engine.fsdp import FsdpEngine

        return FsdpEngine(precision, timeout_s, deterministic=full)
    from bigbatch.trainers.engine.zero import ZeroEngine

    stage = {"zero1": 1, "zero2": 2}[backend]
    return ZeroEngine(precision, stage, timeout_s, deterministic=full)
