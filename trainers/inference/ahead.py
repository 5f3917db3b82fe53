"""Starting to decode what a command will look at, before torch is imported. No torch."""

import argparse
import os
from contextlib import suppress
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import parse_recipe, read_yaml
from bigbatch.configs.rundir import ENSEMBLE, RunDir
from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import height_width
from bigbatch.data.begun import Begun
from bigbatch.data.decode_batch import Source
from bigbatch.data.index import open_index
from bigbatch.trainers.inference.looks import view_of

_FROM = 256  # images of a rank; fewer are decoded sooner than a process for it has started
begun: Begun | None = None  # of this process's command


def begin(arguments: list[str]) -> None:
    """Let workers decode the first batches of `evaluate`, `predict`, `ensemble` of indexed shards.

    Not where nothing is gained, nor where something is wrong, which the command itself will say.
    What they make is used only where the command then asks for just that.
    """
    global begun
    if arguments[:1] in (["evaluate"], ["predict"], ["ensemble"]):
        with suppress(UserError, OSError):
            begun = _begin(arguments)


def _begin(arguments: list[str]) -> Begun | None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("command")
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--tta", default="none")
    parser.add_argument("--soup")
    options, _ = parser.parse_known_args(arguments)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if options.soup is not None:  # which reads its images in its own way
        return None
    if len(os.sched_getaffinity(0)) < 2 or not (options.source / "index").is_dir():
        return None
    recipes = [recipe for path in options.model for recipe in _recipes(path)]
    view, data = view_of(recipes[0]), recipes[0].data
    if data.workers == 0 or any(view_of(recipe) != view for recipe in recipes):
        return None
    index = open_index(options.source)
    if len(index) < _FROM * world:
        return None
    source = Source(
        root=index.root,
        shards=[file.name for file in index.shards],
        image_size=max(height_width(view.out)),
        channels=data.channels,
        threads=data.threads,
        view=view if options.tta in ("none", "flip") else None,
    )
    batch = options.batch or recipes[0].evaluate.batch
    return Begun(index, source, data.workers, batch=batch, rank=rank, world=world)


def _recipes(path: Path) -> list[Recipe]:
    if not (path / ENSEMBLE).is_file():
        return [RunDir(path).recipe()]
    files = sorted((path / "members").glob("*.yaml"))
    return [parse_recipe(read_yaml(file), str(file)) for file in files]
