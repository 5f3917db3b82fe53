"""Checkpoints: atomic, verified on load, free of pickle.

A checkpoint is a folder that appears under its final name only when every byte of it is on
disk; its manifest holds the size and SHA-256 of each file.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import sync, to_json, write_atomically
from bigbatch.configs.identity import differences, summary
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.load import parse_recipe
from bigbatch.trainers.engine.pieces import Pieces
from bigbatch.trainers.models.weights_file import WeightsInfo, read_header
from bigbatch.trainers.optim import load_optimizer_state, optimizer_state_by_name
from bigbatch.trainers.planning.plateau import Evaluation
from bigbatch.trainers.recovery.tensor_files import (
    copy_to_cpu,
    load_fitting,
    measure,
    write_file,
    write_tensors,
)

MODEL, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
_FILES = (MODEL, OPTIMIZER, STATE)  # of a checkpoint, beside the manifest
_STATE_KINDS: dict[str, Any] = {
    "optimizer": dict,
    "scaler": dict | None,
    "fingerprint": dict,
    "losses": list,
    "over": list,
    "accuracy": float | int | None,
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
    info: WeightsInfo | None = None  # goes with the weights into each file of them


@dataclass
class Capture:
    """A TrainState copied to the CPU: all that `write` needs, and nothing that training changes."""

    step: int
    model: dict[str, Tensor]  # contiguous CPU tensors, under timm's own names
    optimizer: dict[str, Tensor]  # likewise, keyed STATE/PARAM
    content: dict[str, JsonValue]  # state.json
    info: WeightsInfo | None = None


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
        copy_to_cpu(weights, into.model if into else {}),
        copy_to_cpu(tensors, into.optimizer if into else {}),
        content,
        state.info,
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
            MODEL: write_tensors(temporary / MODEL, captured.model, captured.info),
            OPTIMIZER: write_tensors(temporary / OPTIMIZER, captured.optimizer),
            STATE: write_file(temporary / STATE, [to_json(captured.content, indent=1).encode()]),
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
    """Raise Damaged unless every file has the size and hash that the manifest names, and holds
    what a checkpoint's can hold. The manifest names a checkpoint's files and no other ones."""
    try:
        files = parse_json((path / MANIFEST).read_bytes())["files"]
        if files.keys() != set(_FILES):
            raise Damaged(f"{path / MANIFEST} names other files than {', '.join(_FILES)}")
        for name in _FILES:
            if measure(path / name) != files[name]:
                raise Damaged(f"{path / name} differs from its manifest (size or SHA-256)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is incomplete: {error}") from None
    for name in _FILES:
        try:
            if name == STATE:
                check_state(parse_json((path / STATE).read_bytes()), step_of(path))
            else:
                read_header(path / name)
        except (OSError, ValueError) as error:
            raise Damaged(f"{path / name} is damaged: {error}") from None


def check_state(content: Any, step: int) -> None:
    """Raise ValueError where state.json, of the checkpoint of `step`, holds what cannot be.

    What it lacks is the matter of `load_checkpoint`: another version may have written it.
    """
    if not isinstance(content, dict):
        raise ValueError("it is no mapping")
    if content.get("step", step) != step:
        raise ValueError(f"it is of step {content['step']!r:.40}")
    for name, kinds in _STATE_KINDS.items():
        if name in content and not isinstance(content[name], kinds):
            raise ValueError(f"{name} is {content[name]!r:.40}")
    if not all(isinstance(loss, float | int) for loss in content.get("losses", [])):
        raise ValueError("losses holds what is no number")
    for steps in content.get("over", []):
        if not (isinstance(steps, list) and len(steps) == 2 and {*map(type, steps)} == {int}):
            raise ValueError(f"over holds {steps!r:.40}, no range of steps")


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
    content = parse_json((path / STATE).read_bytes())
    lacking = [key for key in ("step", "optimizer", "fingerprint") if key not in content]
    if lacking:
        raise UserError(f"{path / STATE} holds no {' and no '.join(lacking)}{_OTHER_VERSION}")
    _check_fingerprint(path, content["fingerprint"], state.fingerprint)
    module = state.model if state.pieces is None else state.pieces.module
    try:
        tensors = load_file(path / OPTIMIZER)
        weights = load_fitting(module, path / MODEL)
        if state.pieces is not None:
            state.pieces.load(weights, tensors, content["optimizer"])
        else:
            state.model.load_state_dict(weights)
            load_optimizer_state(state.optimizer, state.model, tensors, content["optimizer"])
    except (ValueError, LookupError, SafetensorError) as error:
        raise UserError(f"{path}: {error}{_OTHER_VERSION}") from None
    if state.scaler is not None and content.get("scaler") is not None:
        state.scaler.load_state_dict(content["scaler"])
    state.losses[:] = content.get("losses", [])
    state.skipped_steps[:] = content.get("over", [])
    state.step = content["step"]


def _accuracy(path: Path) -> float | None:
    """The validation accuracy that a checkpoint was saved with; None: none, or damaged."""
    try:
        value = parse_json((path / STATE).read_bytes())["accuracy"]
        return None if value is None else float(value)
    except (OSError, ValueError, KeyError, TypeError):
        return None
