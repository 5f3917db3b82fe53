"""What a compressed network takes: bytes, operations, milliseconds; and how right it is."""

import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from bigbatch.configs.size import Size
from bigbatch.data.rng import uniforms
from bigbatch.trainers.evaluation.accuracy import wilson
from bigbatch.trainers.evaluation.outcomes import Outcomes
from bigbatch.trainers.evaluation.paired import bootstrap
from bigbatch.trainers.models.size import count_flops

_CHUNK = 1 << 24


def sizes(path: Path) -> dict[str, int]:
    """Bytes of a file, and of the same file after gzip, which is how zeros are not paid for."""
    compressor, packed = zlib.compressobj(6, wbits=31), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            packed += len(compressor.compress(chunk))
    return {"bytes": path.stat().st_size, "gzip_bytes": packed + len(compressor.flush())}


def counts(model: nn.Module, channels: int, image_size: Size) -> dict[str, int]:
    """Parameters, how many are not 0, and FLOPs of a forward pass of one image.

    A multiplication and its addition count as two; multiplications by 0 count, as they are done.
    """
    weights = list(model.parameters())
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "nonzero": sum(int(weight.count_nonzero()) for weight in weights),
        "flops": count_flops(model, channels, image_size),
    }


def milliseconds(runs: Sequence[Callable[[], object]], rounds: int) -> npt.NDArray[np.float64]:
    """Times [R, rounds] of R runs.

    They take turns, so that a busy machine meets all alike, in each round in another order:
    after a small network the caches are not what they are after a large one.
    """
    times = np.empty((len(runs), rounds))
    for round in range(-1, rounds):
        for place in np.argsort(uniforms((len(runs),), "latency", round)):
            started = time.perf_counter()
            runs[place]()
            if round >= 0:  # the first one warms up
                times[place, round] = 1e3 * (time.perf_counter() - started)
    return times


def scores(found: Outcomes, before: Outcomes) -> dict[str, Any]:
    """Scores with Wilson's interval of the accuracy, and what changed from `before`.

    `change` is the difference of accuracies, with its interval by a paired bootstrap;
    `agreement` the share of images with the label of before.
    """
    right = found.correct
    difference = right.astype(np.float64) - before.correct
    return {
        **found.scores(),
        "interval": wilson(int(right.sum()), len(found)),
        "change": float(difference.mean()),
        "change_interval": bootstrap(difference[:, None])[0].tolist(),
        "agreement": float((found.predicted == before.predicted).mean()),
    }
