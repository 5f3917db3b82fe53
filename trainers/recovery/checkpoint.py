"""Checkpoints: atomic, verified on load, free of pickle.

A checkpoint is a folder that appears under its final name only when every byte of it is on
disk; its manifest holds the size and SHA-256 of each file.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import sync, to_json, write_atomically
from bigbatch.configs.identity import differences, summary
from bigbatch.configs.load import parse_recipe
from bigbatch.trainers.engine.pieces import Pieces
from bigbatch.trainers.optim import load_optimizer_state, optimizer_state_by_name
from bigbatch.trainers.planning.plateau import Evaluation

MODEL, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAME = re.compile(r"step-(\d{8})")
_OTHER_VERSION = (
    ": another version wrote it; go on with those that manifest.json of the run names, "
    "or start a new run"
)


class Damaged(Exception):
    """A checkpoint that does not verify; the message names the file and the reason."""


@dataclass
class TrainState:
    """Everything that resumes. The data position is `step`; so is every random number."""

    step: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any | None  # torch.amp.GradScaler under fp16
    fingerprint: dict[str, JsonValue]  # recipe, and hash of the order: what weights depend on
    pieces: Pieces | None = None  # where ranks hold pieces, how to gather and to cut them
    losses: list[float] = field(default_factory=list)  # the last ones, to tell a spike by
    skipped_steps: list[list[int]] = field(default_factory=list)  # ranges that make no update
    # Of the validation split so far. Not in the checkpoint: metrics.jsonl has them.
    evaluations: list[Evaluation] = field(default_factory=list)


@dataclass
class Capture:
    """A TrainState copied to the CPU: all that `write` needs, and nothing that training changes."""

    step: int
    model: dict[str, Tensor]  # contiguous CPU tensors, under timm's own names
    optimizer: dict[str, Tensor]  # likewise, keyed STATE/PARAM
    content: dict[str, JsonValue]  # state.json


def capture(state: TrainState, into: Capture | None = None) -> Capture:
    """Copy everything that resumes to the CPU. With pieces, every other rank calls their
    `gather` meanwhile.

    The memory of an earlier capture `into` is used again where names and shapes agree: fresh
    pages cost more than the copy.
    """
    if state.pieces is not None:
        weights, tensors, scalars = state.pieces.gather()
    else:
        weights = state.model.state_dict()
        tensors, scalars = optimizer_state_by_name(state.optimizer, state.model)
    content: dict[str, JsonValue] = {
        "step": state.step,
        "optimizer": scalars,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "fingerprint": dict(state.fingerprint),
        "losses": list(state.losses),
        "over": [list(steps) for steps in state.skipped_steps],
    }
    return Capture(
        state.step,
        _copy(weights, into.model if into else {}),
        _copy(tensors, into.optimizer if into else {}),
        content,
    )


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay on the disk; the others go when a new one stands."""

    newest: int = 2
    best: int = 0  # by accuracy on the validation split, among those whose step was evaluated
    every: int | None = None  # steps: those at multiples of it stay for good
    back: int = 0  # steps: the newest that is this much older than the last one, for a rollback

    def kept(self, accuracies: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of {step: accuracy or None}."""
        steps = sorted(accuracies)
        scored = [(a, -step) for step, a in accuracies.items() if a is not None]
        kept = set(steps[-self.newest :])
        kept |= {-step for _, step in sorted(scored, reverse=True)[: self.best]}
        kept |= set([s for s in steps if s <= steps[-1] - self.back][-1:])
        return kept | {step for step in steps if self.every and step % self.every == 0}


def write(
    folder: Path,
    captured: Capture,
    retention: Retention,
    before: Callable[[], None] | None = None,
) -> Path:
    """Write ``folder/step-NNNNNNNN`` and remove what `retention` does not keep.

    `before` runs when all files are on disk, just before they get their final name: it puts
    onto the disk what the checkpoint must not outlive. Raises OSError; older checkpoints are
    then as they were. Needs no other rank, and may run in any thread.
    """
    final = folder / f"step-{captured.step:08d}"
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process's of the same number
    temporary.mkdir()
    try:
        files = {
            MODEL: write_tensors(temporary / MODEL, captured.model),
            OPTIMIZER: write_tensors(temporary / OPTIMIZER, captured.optimizer),
            STATE: _write(temporary / STATE, [to_json(captured.content, indent=1).encode()]),
        }
        manifest = {"step": captured.step, "files": files}
        write_atomically(temporary / MANIFEST, to_json(manifest, indent=1))
        sync(temporary)
        if before is not None:
            before()
        if final.exists():  # an older attempt's, from a run that was rolled back or damaged
            shutil.rmtree(final)
        temporary.rename(final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # the next try may need its room
        raise
    sync(folder)
    prune(folder, retention, captured.step)
    return final


def save_weights(model: nn.Module, path: Path) -> None:
    """The model's weights under timm's own names: `timm.create_model(checkpoint_path=...)`."""
    write_tensors(path, _copy(model.state_dict(), {}))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, int | str]:
    """Write contiguous CPU tensors as safetensors and put them onto the disk.

    Returns size and SHA-256 of what was written. The library's own writer would hold
    Python's lock meanwhile, and so the training loop. Source: the format's description,
    github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {}
    end = 0
    # The widest first, so that every tensor is aligned to its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    for name in names:
        start, end = end, end + tensors[name].nbytes
        kind, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    return _write(
        path,
        [
            len(text).to_bytes(8, "little") + text,
            *(tensors[n].reshape(-1).view(torch.uint8).numpy().data for n in names),
        ],
    )


def prune(folder: Path, retention: Retention, step: int) -> None:
    """Remove what `retention` does not keep, and what killed attempts left behind.

    Checkpoints beyond `step`, the one just written, are those that the run could not go on
    from: they stay until it comes there, and do not count as the newest.
    """
    found = {step_of(path): path for path in list_checkpoints(folder)}
    paths = {number: path for number, path in found.items() if number <= step}
    scores = {s: _accuracy(p) if retention.best else None for s, p in paths.items()}
    for number in paths.keys() - retention.kept(scores):
        shutil.rmtree(paths[number])
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def step_of(path: Path) -> int:
    """The number of finished steps that a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def verify(path: Path) -> None:
    """Raise Damaged unless every file has the size and hash that the manifest names."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if _measure(path / name) != expected:
                raise Damaged(f"{path / name} differs from its manifest (size or SHA-256)")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is incomplete: {error}") from None


def newest_valid(
    folder: Path, objection: Callable[[int], str | None] = lambda step: None
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with the newer ones.

    One whose step meets with an `objection` is used only where there is no other. Raises
    UserError where there are checkpoints and none verifies: starting again from nothing must
    be the user's own decision.
    """
    problems: list[str] = []
    second_best: Path | None = None
    for path in list_checkpoints(folder):
        try:
            verify(path)
        except Damaged as error:
            problems.append(str(error))
            continue
        why = objection(step_of(path))
        if why is None:
            return path, problems
        problems.append(f"{path}: {why}")
        second_best = second_best or path
    if problems and second_best is None:
        raise UserError(
            f"no checkpoint in {folder} verifies:\n  "
            + "\n  ".join(problems)
            + "\nrestore one from a backup, or start a new run with `bigbatch train`"
        )
    return second_best, problems


def _check_fingerprint(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise UserError where a checkpoint's steps are not those of this run; it names why.

    Recipes are compared key by key, so a key that this version added, at its default, is no
    difference. Early checkpoints hold no recipe; theirs is the run's own recipe.yaml.
    """
    if "recipe" in there and "recipe" in here:
        then, now = (parse_recipe(f["recipe"], f"in {path / STATE}") for f in (there, here))
        if found := differences(then, now):
            raise UserError(
                f"{path} was written with another recipe: {summary(found)} (recipe.yaml of the "
                "run); put the old values back, or start a new run"
            )
    if there.get("order_hash") != here.get("order_hash"):
        raise UserError(
            f"{path} was trained on other data: its order_hash is {there.get('order_hash')}, that "
            f"of the training split here {here.get('order_hash')}; put the same shards and index "
            "back, or start a new run"
        )


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Fill `state` from a verified checkpoint.

    Raises UserError where it was written by another recipe, over other data, or by a version
    of bigbatch or timm whose names do not fit. What older versions did not keep starts empty.
    """
    content = json.loads((path / STATE).read_text())
    lacking = [key for key in ("step", "optimizer", "fingerprint") if key not in content]
    if lacking:
        raise UserError(f"{path / STATE} holds no {' and no '.join(lacking)}{_OTHER_VERSION}")
    _check_fingerprint(path, content["fingerprint"], state.fingerprint)
    tensors = load_file(path / OPTIMIZER)
    try:
        if state.pieces is not None:
            state.pieces.load(load_file(path / MODEL), tensors, content["optimizer"])
        else:
            load_weights(state.model, path / MODEL)
            load_optimizer_state(state.optimizer, state.model, tensors, content["optimizer"])
    except ValueError as error:
        raise UserError(f"{path}: {error}{_OTHER_VERSION}") from None
    if state.scaler is not None and content.get("scaler") is not None:
        state.scaler.load_state_dict(content["scaler"])
    state.losses[:] = content.get("losses", [])
    state.skipped_steps[:] = content.get("over", [])
    state.step = content["step"]


def load_weights(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Load weights strictly; returns them. Raises ValueError where names do not fit."""
    tensors = load_file(path)
    if odd := model.state_dict().keys() ^ tensors.keys():
        raise ValueError(f"weights do not fit: {sorted(odd)[:8]}")
    model.load_state_dict(tensors)
    return tensors


def _accuracy(path: Path) -> float | None:
    """The validation accuracy that a checkpoint was saved with; None: none, or damaged."""
    try:
        value = json.loads((path / STATE).read_text())["accuracy"]
        return None if value is None else float(value)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _copy(tensors: dict[str, Tensor], into: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU; the memory of `into` is used where it fits."""
    copies = {}
    for name, tensor in tensors.items():
        old = into.get(name)
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            old = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = old.copy_(tensor.detach())
    return copies


def _write(path: Path, parts: Sequence[bytes | memoryview]) -> dict[str, int | str]:
    """Write and sync a file; returns what `_measure` finds if the disk holds the same bytes."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _measure(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
