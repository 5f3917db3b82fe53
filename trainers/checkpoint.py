"""Checkpoints: atomic, verified on load, free of pickle.

A checkpoint is a folder that appears under its final name only when every byte of it is on
disk; its manifest holds the size and SHA-256 of each file.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import sync
from bigbatch.trainers.optim import load_optimizer_state, optimizer_state_by_name

MODEL, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
_NAME = re.compile(r"step-(\d{8})")


class Damaged(Exception):
    """A checkpoint that does not verify; the message names the file and the reason."""


@dataclass
class TrainState:
    """Everything that resumes. The data position is `step`; so is every random number."""

    step: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any | None  # torch.amp.GradScaler under fp16
    fingerprint: dict[str, str]  # hashes of recipe and order: what the weights depend on


def save_checkpoint(folder: Path, state: TrainState, keep: int) -> Path:
    """Write ``folder/step-NNNNNNNN`` and remove all but the newest `keep` checkpoints."""
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    temporary.mkdir()
    tensors, scalars = optimizer_state_by_name(state.optimizer, state.model)
    save_weights(state.model, temporary / MODEL)
    save_file(tensors, temporary / OPTIMIZER)
    content = {
        "step": state.step,
        "optimizer": scalars,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "fingerprint": state.fingerprint,
    }
    (temporary / STATE).write_text(json.dumps(content, indent=1))
    files = {n: _measure(temporary / n) for n in (MODEL, OPTIMIZER, STATE)}
    (temporary / MANIFEST).write_text(json.dumps({"step": state.step, "files": files}, indent=1))
    for name in (*files, MANIFEST):
        sync(temporary / name)
    sync(temporary)
    if final.exists():  # an older attempt's, from a run that was rolled back or damaged
        shutil.rmtree(final)
    temporary.rename(final)
    sync(folder)
    prune(folder, keep)
    return final


def save_weights(model: nn.Module, path: Path) -> None:
    """The model's weights under timm's own names: `timm.create_model(checkpoint_path=...)`."""
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed attempts left behind."""
    for path in list_checkpoints(folder)[keep:]:
        shutil.rmtree(path)
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def verify(path: Path) -> None:
    """Raise Damaged unless every file has the size and hash that the manifest names."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if _measure(path / name) != expected:
                raise Damaged(f"{path / name} differs from its manifest (size or SHA-256)")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is incomplete: {error}") from None


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with the newer ones.

    Raises UserError where there are checkpoints and none verifies: starting again from
    nothing must be the user's own decision.
    """
    problems: list[str] = []
    for path in list_checkpoints(folder):
        try:
            verify(path)
        except Damaged as error:
            problems.append(str(error))
        else:
            return path, problems
    if problems:
        raise UserError(
            f"no checkpoint in {folder} verifies:\n  "
            + "\n  ".join(problems)
            + "\nrestore one from a backup, or start a new run with `bigbatch train`"
        )
    return None, []


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Fill `state` from a verified checkpoint.

    Raises UserError where it was written by another recipe or over other data.
    """
    content = json.loads((path / STATE).read_text())
    for what, value in state.fingerprint.items():
        if content["fingerprint"].get(what) != value:
            raise UserError(
                f"{path} was written with {what} {content['fingerprint'].get(what)}, this run "
                f"has {what} {value}: its steps would not be the same; start a new run instead"
            )
    load_weights(state.model, path / MODEL)
    tensors = load_file(path / OPTIMIZER)
    load_optimizer_state(state.optimizer, state.model, tensors, content["optimizer"])
    if state.scaler is not None and content["scaler"] is not None:
        state.scaler.load_state_dict(content["scaler"])
    state.step = content["step"]


def load_weights(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Load weights strictly; returns them."""
    tensors = load_file(path)
    model.load_state_dict(tensors)
    return tensors


def _measure(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
