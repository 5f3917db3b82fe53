"""What a checkpoint holds, and how it is written and loaded: atomic, free of pickle."""

import os
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

from bigbatch.configs.errors import Changed, UserError
from bigbatch.configs.files import sync, to_json, write_atomically
from bigbatch.configs.identity import differences, summary
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.load import parse_recipe
from bigbatch.configs.notices import notice
from bigbatch.trainers.engine.pieces import Pieces
from bigbatch.trainers.models.weights_file import WeightsInfo
from bigbatch.trainers.optim import load_optimizer_state, optimizer_state_by_name
from bigbatch.trainers.optim.averaging import WeightAverage
from bigbatch.trainers.planning.plateau import Evaluation
from bigbatch.trainers.recovery.stored import (
    AVERAGE,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    STATISTICS,
    Retention,
    checkpoint_path,
    prune,
    remove,
)
from bigbatch.trainers.recovery.tensor_files import (
    copy_to_cpu,
    fitting,
    write_file,
    write_tensors,
)

_OTHER_VERSION = (
    ": another version wrote it; go on with those that manifest.json of the run names, "
    "or start a new run"
)


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
    noise: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of gradients: NoiseScale's
    skipped_steps: list[list[int]] = field(default_factory=list)  # ranges that make no update
    decided: list[tuple[int, int]] = field(default_factory=list)  # (samples, batch), rising
    # Of the validation split so far. Not in the checkpoint: metrics.jsonl has them.
    evaluations: list[Evaluation] = field(default_factory=list)
    info: WeightsInfo | None = None  # goes with the weights into each file of them
    average: WeightAverage | None = None  # of the weights, where the recipe asks for one
    # A step, and the running statistics by name that its weights were evaluated with, where these
    # were not training's own. Not resumed: the next evaluation makes its own.
    evaluated: tuple[int, dict[str, Tensor]] | None = None


@dataclass
class Capture:
    """A TrainState copied to the CPU: all that `write` needs, and nothing that training changes."""

    step: int
    model: dict[str, Tensor]  # contiguous CPU tensors, under timm's own names
    optimizer: dict[str, Tensor]  # likewise, keyed STATE/PARAM
    content: dict[str, JsonValue]  # state.json
    info: WeightsInfo | None = None
    average: dict[str, Tensor] = field(default_factory=dict)  # likewise; empty: none yet
    statistics: dict[str, Tensor] = field(default_factory=dict)  # training's, if not the model's


def gather(
    state: TrainState,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, JsonValue], dict[str, Tensor]]:
    """Weights, optimizer state and average as a checkpoint stores them: whole on rank 0.

    With pieces, every rank calls it in the same step.
    """
    average = state.average.tensors if state.average and state.average.count else {}
    if state.pieces is None:
        tensors, scalars = optimizer_state_by_name(state.optimizer, state.model)
        return state.model.state_dict(), tensors, scalars, average
    return *state.pieces.gather(), state.pieces.whole(average) if average else {}


def capture(state: TrainState, into: Capture | None = None) -> Capture:
    """Copy everything that resumes to the CPU. With pieces, every other rank calls `gather`.

    The memory of an earlier capture `into` is used again where names and shapes agree: fresh
    pages cost more than the copy.
    """
    weights, tensors, scalars, average = gather(state)
    statistics: dict[str, Tensor] = {}
    if state.evaluated is not None and state.evaluated[0] == state.step:
        # The model is the one that was evaluated; what training goes on with lies beside it.
        statistics = {name: weights[name] for name in state.evaluated[1]}
        weights = {**weights, **state.evaluated[1]}
    content: dict[str, JsonValue] = {
        "step": state.step,
        "optimizer": scalars,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "fingerprint": dict(state.fingerprint),
        "losses": list(state.losses),
        "noise": list(state.noise),
        "batches": [list(decision) for decision in state.decided],
        "over": [list(steps) for steps in state.skipped_steps],
        "averaged": state.average.count if state.average else 0,
        "precise_bn": bool(statistics),
    }
    return Capture(
        state.step,
        copy_to_cpu(weights, into.model if into else {}),
        copy_to_cpu(tensors, into.optimizer if into else {}),
        content,
        state.info,
        copy_to_cpu(average, into.average if into else {}),
        copy_to_cpu(statistics, into.statistics if into else {}),
    )


def write(
    folder: Path,
    captured: Capture,
    retention: Retention,
    before: Callable[[], None] | None = None,
    complain: Callable[[str], object] = notice,
) -> Path:
    """Write ``folder/step-NNNNNNNN`` and remove what `retention` does not keep.

    `before` runs when all files are on disk, just before they get their final name: it puts
    onto the disk what the checkpoint must not outlive. `complain` is told which older ones could
    not be removed once this one stands. Raises OSError; older checkpoints are then as they were.
    Needs no other rank, and may run in any thread.
    """
    final = checkpoint_path(folder, captured.step)
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
        if captured.average:
            files[AVERAGE] = write_tensors(temporary / AVERAGE, captured.average, captured.info)
        if captured.statistics:
            files[STATISTICS] = write_tensors(temporary / STATISTICS, captured.statistics)
        manifest = {"step": captured.step, "files": files}
        write_atomically(temporary / MANIFEST, to_json(manifest, indent=1))
        sync(temporary)
        if before is not None:
            before()
        if final.exists():  # an older attempt's, from a run that was rolled back or damaged
            remove(final)
        temporary.rename(final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # the next try may need its room
        raise
    sync(folder)
    for problem in prune(folder, retention, captured.step):
        complain(problem)
    return final


def check_fingerprint(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise Changed where a checkpoint's steps are not those of this run; it names why.

    Recipes are compared key by key, so a key that this version added, at its default, is no
    difference. Early checkpoints hold no recipe; theirs is the run's own recipe.yaml.
    """
    if "recipe" in there and "recipe" in here:
        then, now = (parse_recipe(f["recipe"], f"in {path / STATE}") for f in (there, here))
        if found := differences(then, now):
            raise Changed(
                f"{path} was written with another recipe: {summary(found)} (recipe.yaml of the "
                "run); put the old values back, or start a new run"
            )
    if there.get("order_hash") != here.get("order_hash"):
        raise Changed(
            f"{path} was trained on other data: its order_hash is {there.get('order_hash')}, that "
            f"of the training split here {here.get('order_hash')}; put the same shards and index "
            "back, or start a new run"
        )
    taught, teacher = (f.get("teacher_hash") for f in (there, here))
    if taught != teacher:
        raise Changed(
            f"{path} learned from another teacher: its teacher_hash is {taught}, that of "
            f"distill.teacher here {teacher}; put the same weights back, or start a new run"
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
    check_fingerprint(path, content["fingerprint"], state.fingerprint)
    module = state.model if state.pieces is None else state.pieces.module
    try:
        tensors = load_file(path / OPTIMIZER)
        weights = fitting(module, load_file(path / MODEL))
        if content.get("precise_bn", False):
            weights |= _fitting_statistics(weights, load_file(path / STATISTICS))
        if state.pieces is not None:
            state.pieces.load(weights, tensors, content["optimizer"])
        else:
            state.model.load_state_dict(weights)
            load_optimizer_state(state.optimizer, state.model, tensors, content["optimizer"])
        if state.average is not None:
            count = content.get("averaged", 0)
            averages = load_file(path / AVERAGE) if count else {}
            state.average.load(count, state.pieces.cut(averages) if state.pieces else averages)
    except (ValueError, LookupError, SafetensorError) as error:
        raise UserError(f"{path}: {error}{_OTHER_VERSION}") from None
    if state.scaler is not None and content.get("scaler") is not None:
        state.scaler.load_state_dict(content["scaler"])
    state.losses[:] = content.get("losses", [])
    state.noise[:] = content.get("noise", [0.0, 0.0])
    state.decided[:] = [(samples, batch) for samples, batch in content.get("batches", [])]
    state.skipped_steps[:] = content.get("over", [])
    state.step = content["step"]
    state.evaluated = None


def _fitting_statistics(
    weights: Mapping[str, Tensor], found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Running statistics of a file; ValueError unless they fit among the weights."""
    for name, value in found.items():
        own = weights.get(name)
        if own is None or (own.shape, own.dtype) != (value.shape, value.dtype):
            raise ValueError(f"running statistics do not fit: {name}")
    return found
