"""Members of an ensemble: snapshots on the disk, and which of them may take part."""

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from bigbatch.configs.files import sync, to_json, write_atomically
from bigbatch.trainers.models.weights_file import WeightsInfo
from bigbatch.trainers.recovery.stored import MODEL
from bigbatch.trainers.recovery.tensor_files import save_weights


def save_snapshot(
    folder: Path,
    number: int,
    step: int,
    model: nn.Module,
    scores: Any,
    info: WeightsInfo | None = None,
) -> Path:
    """Keep the weights of a cycle's end as ``folder/cycle-NN``, all or nothing."""
    final = folder / f"cycle-{number:02d}"
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    for left_over in folder.glob(f"{final.name}.tmp-*"):  # of a killed attempt
        shutil.rmtree(left_over)
    temporary.mkdir(parents=True)
    try:
        save_weights(model, temporary / MODEL, info)
        write_atomically(temporary / "metrics.json", to_json({"step": step, **scores}))
        sync(temporary)
        if final.exists():  # an attempt that was killed before its next checkpoint
            shutil.rmtree(final)
        temporary.rename(final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk has no room for half of one
        raise
    sync(folder)
    return final


def list_snapshots(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("cycle-*") if ".tmp-" not in p.name)


def within_margin(accuracies: list[float], margin: float) -> list[int]:
    """Members whose validation accuracy is within `margin` of the best one's."""
    best = max(accuracies)
    return [i for i, accuracy in enumerate(accuracies) if accuracy >= best - margin]
