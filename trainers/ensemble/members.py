"""Members of an ensemble: weights of runs on the disk."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigbatch.configs.decisions import recipe_of
from bigbatch.configs.errors import UserError
from bigbatch.configs.files import sync, to_json, write_atomically
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.rundir import RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.configs.targets import learns_targets
from bigbatch.trainers.models.build import build_model, choose_memory_format
from bigbatch.trainers.models.compressed import compression_of, load_compressed
from bigbatch.trainers.models.weights_file import (
    WeightsInfo,
    check_same,
    describe,
    read_header,
    read_info,
    unlike,
)
from bigbatch.trainers.planning.inputs import open_split
from bigbatch.trainers.recovery.stored import (
    MODEL,
    list_checkpoints,
    list_snapshots,
    snapshot_step,
)
from bigbatch.trainers.recovery.tensor_files import load_weights, save_weights

MEMBERS = "members.json"  # of a finished run: which snapshots are kept
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Member:
    """One set of weights, and all that has to be known to use them.

    `name` tells it from the others, such as digits/cycle-03. `recipe` is the one that trained
    it: its model, image size, channels, crop, mean and std are what the weights expect.
    """

    name: str
    weights: Path
    recipe: Recipe
    classes: tuple[str, ...]  # by number

    @property
    def info(self) -> WeightsInfo:
        return describe(self.recipe, self.classes)

    def build(self, device: torch.device = _CPU) -> nn.Module:
        """The network on a device, in eval mode. UserError, which names the member."""
        # Where the weights once started from is no matter any more, nor need it still be there.
        config = self.recipe.model.without_weights()
        try:
            model = build_model(
                config,
                classes=len(self.classes),
                channels=self.recipe.data.channels,
                seed=0,
                image_size=self.recipe.data.image_size,
            )
            load = load_weights if compression_of(self.weights) is None else load_compressed
            load(model, self.weights)
        except UserError as error:
            raise UserError(f"member {self.name}: {error}") from None
        memory_format = choose_memory_format(self.recipe.model, device)
        return model.eval().to(device).to(memory_format=memory_format)


def find_members(run: RunDir, choice: str = "auto") -> list[Member]:
    """The members of a run.

    `choice` is auto: the snapshots that the run's ensemble kept, or the average of its workers; of
    a run that is not finished all that there are, and before the first one the newest checkpoint;
    all: every snapshot, and the checkpoints of other steps; or names of either, of the soup or of
    averaged weights, such as ``cycle-01,step-00000120,soup``. Raises UserError where there is none,
    or not all of them.
    """
    recipe = recipe_of(run)
    there = _weights(run)
    names = _chosen(run, choice, there)
    return [_member(f"{run.name}/{name}", there[name], recipe) for name in names]


def _weights(run: RunDir) -> dict[str, Path]:
    """What a run holds, by name: snapshots, checkpoints from old to new, and what is averaged."""
    folders = [*list_snapshots(run.snapshots), *reversed(list_checkpoints(run.checkpoints))]
    found = {folder.name: folder / MODEL for folder in folders}
    return found | {path.stem: path for path in sorted(run.ensemble.glob("*.safetensors"))}


def _chosen(run: RunDir, choice: str, there: dict[str, Path]) -> list[str]:
    snapshots = [name for name in there if name.startswith("cycle-")]
    checkpoints = [name for name in there if name.startswith("step-")]
    if choice == "auto":
        names = _kept(run) or snapshots or checkpoints[-1:]
    elif choice == "all":
        taken = {snapshot_step(there[name].parent) for name in snapshots}
        names = [*snapshots, *(n for n in checkpoints if int(n.removeprefix("step-")) not in taken)]
    else:
        names = [name.strip() for name in choice.split(",")]
    if not names:
        raise UserError(
            f"{run.path} holds no weights yet: neither a snapshot nor a checkpoint; train it first"
        )
    if missing := [name for name in names if name not in there]:
        raise UserError(
            f"{run.path} has no member {missing[0]!a:.60}; it has {', '.join(there) or 'none'}"
        )
    if len(set(names)) < len(names):
        raise UserError(f"--members {choice} names one member twice; name each once")
    return names


def _kept(run: RunDir) -> list[str]:
    """The snapshots that a finished run's ensemble is made of."""
    path = run.ensemble / MEMBERS
    if not path.is_file():
        return []
    try:
        kept = parse_json(path.read_bytes())["kept"]
    except (OSError, ValueError, LookupError, TypeError):
        kept = None
    if not (isinstance(kept, list) and all(isinstance(name, str) for name in kept)):
        raise UserError(
            f"{path} is damaged; name the members with --members, or give --members all"
        )
    return kept


def keep_alone(run: RunDir, name: str) -> None:
    """Let a run whose snapshots are combined keep the member `name` in their place."""
    path = run.ensemble / MEMBERS
    content = parse_json(path.read_bytes()) | {"kept": [name]}
    write_atomically(path, to_json(content, indent=1))


def _member(name: str, weights: Path, recipe: Recipe) -> Member:
    try:
        info = read_info(read_header(weights))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"member {name}: {weights} cannot be read ({reason}); restore it from a backup, or "
            "leave it out with --members"
        ) from None
    classes = info.classes if info else _classes_of_data(name, recipe)
    member = Member(name, weights, recipe, classes)
    try:
        check_same(str(weights), info, member.info, "its recipe.yaml says")
    except ValueError as error:
        raise UserError(f"member {name}: {error}; put the files of the run back") from None
    return member


def _classes_of_data(name: str, recipe: Recipe) -> tuple[str, ...]:
    """Weights of 0.1.0 do not name their classes; their run's data does."""
    try:
        return open_split(recipe.data, recipe.data.val).classes
    except UserError as error:
        raise UserError(
            f"member {name}: its weights do not name its classes, so the data that it was trained "
            f"on must: {error}; put it back, or correct data.path in its recipe.yaml"
        ) from None


def check_members(members: Sequence[Member]) -> None:
    """Raise UserError, which names the member, where one does not fit the first."""
    first = members[0]
    for member in members[1:]:
        if member.recipe.data.channels != first.recipe.data.channels:
            raise UserError(
                f"member {member.name} sees {member.recipe.data.channels} channels, {first.name} "
                f"{first.recipe.data.channels}; combine members of one kind of images"
            )
        if how := unlike(member.classes, first.classes, first.name):
            raise UserError(
                f"member {member.name} has {how}; combine members that were trained on shards "
                "with the same classes.txt"
            )


def require_labels(members: Sequence[Member], what: str) -> None:
    """Raise UserError, which names the member, where one answers with numbers or shares.

    `what` is done with a classifier's answers alone.
    """
    for member in members:
        if learns_targets(member.recipe):
            raise UserError(
                f"member {member.name} learns targets (loss {member.recipe.loss.name}), and {what} "
                "takes a classifier's answers; give runs that learn labels"
            )


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
