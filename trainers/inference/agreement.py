"""What ranks must have found alike before they share the work."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from bigbatch.configs.errors import UserError
from bigbatch.data.listing import Listing
from bigbatch.trainers.engine import Engine


def require_same(engine: Engine, what: str, found: Sequence[str], remedy: str) -> None:
    """Raise UserError on all ranks where one has found others than rank 0. Collective.

    Each rank looks for itself, and batches go to ranks by number: files that come and go meanwhile
    would be lost, or there twice.
    """
    if engine.world == 1:
        return
    text = "\n".join(found).encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(text).hexdigest()
    other = torch.tensor([float(engine.from_main(digest) != digest)])
    ranks = int(engine.sum_by_name({"other": other})["other"].item())
    if ranks:
        raise UserError(f"{ranks} of {engine.world} ranks find other {what} than rank 0; {remedy}")


def require_same_images(engine: Engine, source: str, listing: Listing) -> None:
    """The same of the images of a source."""
    index = listing.index
    columns: list[np.ndarray] = [index.shard, index.offset, index.size, index.label, index.crc]
    columns += [] if index.target is None else [index.target]
    sums = [hashlib.sha256(column.tobytes()).hexdigest() for column in columns]
    found = [*sums, *listing.keys, *(key for key, _ in listing.unreadable)]
    require_same(engine, f"images in {source}", found, "start again when nothing writes there")
