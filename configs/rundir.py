"""The run directory: its layout, its creation, and what can be read from it."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json, write_atomically
from bigbatch.configs.identity import recipe_hash
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.load import dump_recipe, parse_recipe, read_yaml
from bigbatch.configs.schema import Recipe

ANSWERS = "targets.json"  # in a run's ensemble/: predicted numbers beside true ones
ENSEMBLE = "ensemble.json"  # of a folder that `bigbatch ensemble` wrote
_FILES = (
    *("recipe.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "ledger.jsonl"),
    *("summary.json", "report.html", "augmented.png", "job.sbatch", "samples.f16", "audit.json"),
)
_FOLDERS = (
    *("checkpoints", "snapshots", "ensemble", "evaluations", "heartbeats", "stacks", "logs"),
    *("trace", "wandb", "tensorboard", "code"),
)
ROW_BYTES = 6  # of samples.f16: three float16 for each sample of each step
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSIONS = ("bigbatch", "torch", "timm", "accelerate", "deepspeed", "kornia", "numpy", "wandb")


@dataclass(frozen=True)
class RunDir:
    """Paths inside ``runs/<name>/``. `metrics.jsonl` is the truth; the rest are views of it."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.absolute().name  # of "." too

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.f16"

    @property
    def certificate(self) -> Path:
        """What `bigbatch audit RUN --out RUN/audit.json` found; nothing else writes it."""
        return self.path / "audit.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def ensemble(self) -> Path:
        return self.path / "ensemble"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def contact_sheet(self) -> Path:
        return self.path / "augmented.png"

    @property
    def trace(self) -> Path:
        return self.path / "trace"

    @property
    def heartbeats(self) -> Path:
        return self.path / "heartbeats"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def forked_from(self) -> dict[str, Any] | None:
        """Where `bigbatch fork` branched it off: `run` and `step` there, `at` which step here."""
        try:
            origin = parse_json(self.manifest.read_bytes())["forked_from"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return origin if isinstance(origin, dict) and isinstance(origin.get("at"), int) else None

    def recipe(self) -> Recipe:
        """The resolved recipe that this run was created with."""
        if not self.recipe_file.is_file():
            raise UserError(
                f"{self.path} is no run directory (it holds no recipe.yaml); "
                "`bigbatch runs` lists the runs there are"
            )
        return parse_recipe(read_yaml(self.recipe_file), str(self.recipe_file))


def check_name(name: str) -> None:
    """Raise UserError where a run may not be called so: names become paths and arguments."""
    if not NAME.fullmatch(name):
        shown = name if len(name) <= 120 else name[:117] + "..."
        raise UserError(
            f"run name {shown!a} is not allowed: use up to 100 letters, digits, '.', '_' "
            "and '-', starting with a letter or digit"
        )


def member_paths(path: Path, count: int) -> list[Path]:
    """PATH-0, PATH-1, ...: runs that belong together."""
    return [path.with_name(f"{path.name}-{k}") for k in range(count)]


class RunExists(UserError):
    """The run directory is there already."""


def create_run(
    path: Path, recipe: Recipe, fill_in: Callable[[Recipe], Recipe] = lambda recipe: recipe
) -> RunDir:
    """Make a new run directory with the resolved recipe, its hash and the versions.

    `fill_in` gives a recipe what it leaves to be measured, once the directory is this caller's.
    Raises RunExists where a run is there already: nothing is ever overwritten.
    """
    check_name(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    except FileExistsError:
        raise RunExists(
            f"{path} exists already; go on with it by `bigbatch resume {path}`, "
            "or choose another name with --run"
        ) from None
    except OSError as error:
        raise UserError(f"cannot create the run directory {path}: {error}") from None
    run = RunDir(path)
    try:
        recipe = fill_in(recipe)
    except BaseException:
        path.rmdir()
        raise
    if "measured" in (recipe.augment.mean, recipe.augment.std):
        path.rmdir()
        raise UserError(
            "augment.mean and std can be measured for a new run alone; write their numbers, which "
            "`bigbatch inspect SHARDS --stats` prints"
        )
    manifest = {
        "name": path.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "recipe_hash": recipe_hash(recipe),
        "git": _git_revision(),
        "versions": {name: _version(name) for name in _VERSIONS},
    }
    try:
        write_atomically(run.manifest, to_json(manifest, indent=2) + "\n")
        write_atomically(run.recipe_file, dump_recipe(recipe))
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)  # half a run could neither start nor resume
        raise UserError(f"cannot write the run directory {path}: {error}") from None
    return run


def check_layout(run: RunDir) -> None:
    """Raise UserError where one of a run's files is a folder, a pipe or a link to nothing, or one
    of its folders is none: reading it would fail, or wait for ever, and writing it end elsewhere.

    Links to files and folders may stand in their place.
    """
    for names, right, word in ((_FILES, Path.is_file, "file"), (_FOLDERS, Path.is_dir, "folder")):
        for path in (run.path / name for name in names):
            # In this order: a run that goes on may make it in between.
            if os.path.lexists(path) and not right(path):
                kind = "a file" if path.is_file() else "a folder" if path.is_dir() else "a pipe"
                what = kind if path.exists() else "a link to nothing"
                raise UserError(f"{path} is {what}, where a run has a {word}; move it away")


def remove_leftovers(run: RunDir) -> None:
    """Remove what a killed holder of the run's lock was writing, and nobody else writes."""
    ours = run.contact_sheet, run.metrics, run.ledger, run.summary, run.ensemble / "*"
    for path in ours:
        for left_over in path.parent.glob(f".{path.name}.tmp-*"):
            left_over.unlink()


def event_record(kind: str, step: int, **fields: Any) -> dict[str, Any]:
    """A record of events.jsonl: when, what, after how many steps, and any plain values."""
    now = time.time()
    date = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now))
    return {"time": round(now, 3), "date": date, "kind": kind, "step": step, **fields}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the code that the user stands in, with + where it has changes."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
