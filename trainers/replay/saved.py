"""Whether the state after a replayed step is the one that the run has saved."""

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bigbatch.configs.json_text import parse_json
from bigbatch.trainers.recovery.checkpoint import TrainState, gather
from bigbatch.trainers.recovery.stored import (
    AVERAGE,
    MODEL,
    OPTIMIZER,
    STATE,
    STATISTICS,
    CorruptCheckpoint,
    checkpoint_path,
    verify,
)
from bigbatch.trainers.replay.past import Past


def unlike_saved(past: Past, state: TrainState) -> list[str] | None:
    """What of the checkpoint after the state's step is not the state's, bit for bit.

    Weights and running statistics, the optimizer's state, and the average of the weights. None:
    there is no checkpoint, or it is of another try.
    """
    path = checkpoint_path(past.run.checkpoints, state.step)
    if not path.is_dir() or (past.refused and state.step == past.step):
        return None
    try:
        verify(path)
        content = parse_json((path / STATE).read_bytes())
        over = [r for r in content.get("over", []) if r[0] < state.step]
        if over != [r for r in past.skipped if r[0] < state.step]:
            return None
        saved = load_file(path / MODEL)
        if content.get("precise_bn", False):
            saved |= load_file(path / STATISTICS)
        optimizer = load_file(path / OPTIMIZER)
        average = load_file(path / AVERAGE) if content.get("averaged", 0) else {}
        values = dict(content["optimizer"])
    except (
        CorruptCheckpoint,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        SafetensorError,
    ) as error:
        # Damaged, or of another version; or the run, which goes on, has removed it by now.
        return [f"file: {error}"] if path.is_dir() else None
    weights, tensors, scalars, averages = gather(state)
    found = _differing("", saved, weights) + _differing("optimizer's ", optimizer, tensors)
    found += [f"optimizer's {n}" for n in values | scalars if values.get(n) != scalars.get(n)]
    return found + _differing("average of ", average, averages)


def _differing(title: str, saved: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> list[str]:
    names = dict.fromkeys((*saved, *here))
    return [f"{title}{name}" for name in names if not _same_bits(saved.get(name), here.get(name))]


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*flat)
