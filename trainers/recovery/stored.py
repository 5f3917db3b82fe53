"""The checkpoints of a run on the disk: listed, verified, kept or removed. Free of torch.

A checkpoint is a folder that appears under its final name only when every byte of it is on
disk; its manifest holds the size and SHA-256 of each file.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import see_that_it_ends
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.judged import ACCURACY, SCORES, Score
from bigbatch.configs.timeline import Crossings, due
from bigbatch.trainers.models.weights_file import read_header

MODEL, OPTIMIZER, AVERAGE, STATISTICS, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "average.safetensors",
    "batch_stats.safetensors",
    "state.json",
    "manifest.json",
)
_FILES = (MODEL, OPTIMIZER, STATE)  # of a checkpoint, beside the manifest
# There exactly where state.json says that weights have been averaged, and that the model has other
# running statistics than training.
_MAY_BE = (AVERAGE, STATISTICS)
_STATE_KINDS: dict[str, Any] = {
    "optimizer": dict,
    "scaler": dict | None,
    "fingerprint": dict,
    "losses": list,
    "noise": list,
    "batches": list,
    "over": list,
    **dict.fromkeys(SCORES, float | int | None),
    "averaged": int,
    "precise_bn": bool,
}
_NAME = re.compile(r"step-(\d{8})")


class CorruptCheckpoint(Exception):
    """A checkpoint that does not verify; the message names the file and the reason."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay on the disk; the others go when a new one stands."""

    newest: int = 2
    best: int = 0  # by `judge` on the validation split, among those whose step was evaluated
    every: int | Crossings | None = None  # steps: those at multiples of it stay for good
    back: int = 0  # steps: the newest that is this much older than the last one, for a rollback
    judge: Score = ACCURACY

    def kept(self, scores: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of {step: score or None}."""
        steps, sign = sorted(scores), self.judge.sign
        scored = [(sign * s, -step) for step, s in scores.items() if s is not None]
        kept = set(steps[-self.newest :])
        kept |= {-step for _, step in sorted(scored, reverse=True)[: self.best]}
        kept |= set([s for s in steps if s <= steps[-1] - self.back][-1:])
        return kept | {step for step in steps if self.every and due(self.every, step)}


def prune(folder: Path, retention: Retention, step: int) -> list[str]:
    """Remove what `retention` does not keep, and what killed attempts left behind.

    Returns what could not be removed, and why: what stays in the way of a save that stands is
    only room on the disk.

    Checkpoints beyond `step`, the one just written, are those that the run could not go on
    from: they stay until it comes there, and do not count as the newest.
    """
    found = {step_of(path): path for path in list_checkpoints(folder)}
    paths = {number: path for number, path in found.items() if number <= step}
    key = retention.judge.key
    scores = {s: _score(p, key) if retention.best else None for s, p in paths.items()}
    doomed = [paths[number] for number in sorted(paths.keys() - retention.kept(scores))]
    left = []
    for path in (*doomed, *folder.glob("step-*.tmp-*")):
        try:
            remove(path)
        except OSError as error:
            left.append(f"cannot remove {path}: {error.strerror or error}")
    return left


def remove(path: Path) -> None:
    """Remove a checkpoint; of one that somebody has put elsewhere, the link to it.

    Raises OSError.
    """
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` finished steps stands, or would."""
    return folder / f"step-{step:08d}"


def list_snapshots(folder: Path) -> list[Path]:
    """Complete snapshots of cycles' ends, oldest first."""
    return sorted(p for p in folder.glob("cycle-*") if ".tmp-" not in p.name)


def snapshot_step(path: Path) -> int | None:
    """After how many steps a snapshot was taken; None where it does not say."""
    try:
        step = parse_json((path / "metrics.json").read_bytes())["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) else None


def step_of(path: Path) -> int:
    """The number of finished steps that a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def verify(path: Path) -> None:
    """Raise CorruptCheckpoint unless every file has the size and hash that the manifest names,
    and holds what a checkpoint's can hold. The manifest names these files and no other ones."""
    try:
        see_that_it_ends(path / MANIFEST)
        files = parse_json((path / MANIFEST).read_bytes())["files"]
        names = [*_FILES, *(name for name in _MAY_BE if name in files)]
        if files.keys() != set(names):
            raise CorruptCheckpoint(f"{path / MANIFEST} names other files than {', '.join(names)}")
        for name in names:
            if measure(path / name) != files[name]:
                raise CorruptCheckpoint(
                    f"{path / name} differs from its manifest (size or SHA-256)"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{path} is incomplete: {error}") from None
    for name in names:
        try:
            if name == STATE:
                content = parse_json((path / STATE).read_bytes())
                check_state(content, step_of(path))
                said = {AVERAGE: "averaged", STATISTICS: "precise_bn"}
                for file, key in said.items():
                    if (content.get(key, 0) > 0) != (file in names):
                        raise ValueError(f"{key} does not go with the files {', '.join(names)}")
            else:
                read_header(path / name)
        except (OSError, ValueError) as error:
            raise CorruptCheckpoint(f"{path / name} is damaged: {error}") from None


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
    if content.get("averaged", 0) < 0:
        raise ValueError(f"averaged is {content['averaged']}")
    for name in ("losses", "noise"):
        if not all(isinstance(value, float | int) for value in content.get(name, [])):
            raise ValueError(f"{name} holds what is no number")
    if len(content.get("noise", (0, 0))) != 2:
        raise ValueError(f"noise is {content['noise']!r:.40}")
    for name, what in (("over", "range of steps"), ("batches", "position and batch")):
        for pair in content.get(name, []):
            if not (isinstance(pair, list) and len(pair) == 2 and {*map(type, pair)} == {int}):
                raise ValueError(f"{name} holds {pair!r:.40}, no {what}")


def newest_valid(
    folder: Path, objection: Callable[[int], str | None] = lambda step: None
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with the newer ones.

    One whose step meets with an `objection` is used only where there is no other. Raises
    UserError where there are checkpoints and none verifies: starting again from nothing must
    be the user's own decision.
    """
    errors: list[str] = []
    second_best: Path | None = None
    for path in list_checkpoints(folder):
        try:
            verify(path)
        except CorruptCheckpoint as error:
            errors.append(str(error))
            continue
        why = objection(step_of(path))
        if why is None:
            return path, errors
        errors.append(f"{path}: {why}")
        second_best = second_best or path
    if errors and second_best is None:
        raise UserError(
            f"no checkpoint in {folder} verifies:\n  "
            + "\n  ".join(errors)
            + "\nrestore one from a backup, or start a new run with `bigbatch train`"
        )
    return second_best, errors


def _score(path: Path, key: str) -> float | None:
    """The validation score that a checkpoint was saved with; None: none, or damaged."""
    try:
        value = parse_json((path / STATE).read_bytes())[key]
        return None if value is None else float(value)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file. Raises OSError, also for a pipe, which has no end."""
    see_that_it_ends(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
