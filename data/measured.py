"""Recipes that leave mean and std to be measured: they are given numbers before a run is made.

Those of pixels (augment) and of targets (loss), over the training split. So a run's own recipe
holds them, and resuming, evaluation and export do not measure again.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import parse_recipe
from bigbatch.configs.notices import notice
from bigbatch.configs.schema import Recipe

_PARTS = ("augment", "loss")
_NAMES = ("mean", "std")


def with_measured(recipe: Recipe) -> Recipe:
    """The recipe with numbers for each mean and std of augment and loss that is `measured`.

    Of pixels those of `bigbatch inspect --stats`: the same for the same shards. Raises UserError
    where there is no such training split here, or it has no targets.
    """
    wanted = _wanted(recipe)
    if not wanted:
        return recipe
    tree = recipe.model_dump(mode="json")
    for part, names in wanted.items():
        values = _pixels(recipe) if part == "augment" else _targets(recipe)
        tree[part] |= {name: list(values[name]) for name in names}
    split = f"{recipe.data.path.rstrip('/')}/{recipe.data.train}"
    return parse_recipe(tree, f"with the mean and std of {split}")


def measured_keys(recipe: Recipe) -> tuple[str, ...]:
    """The same numbers as ``key=value``, for who starts processes by a recipe's name."""
    found = with_measured(recipe)
    return tuple(
        f"{part}.{name}={getattr(getattr(found, part), name)}"
        for part, names in _wanted(recipe).items()
        for name in names
    )


def as_in(there: Recipe, here: Recipe) -> Recipe:
    """`here` with the numbers of `there`, a run that was made from it, for what is measured."""
    changed = {}
    for part, names in _wanted(here).items():
        theirs = getattr(there, part)
        found = {name: getattr(theirs, name) for name in names if hasattr(theirs, name)}
        changed[part] = getattr(here, part).model_copy(update=found)
    return here.model_copy(update=changed) if changed else here


def _wanted(recipe: Recipe) -> dict[str, list[str]]:
    """By part of the recipe, what it leaves to be measured."""
    found = {
        part: [name for name in _NAMES if getattr(getattr(recipe, part), name, None) == "measured"]
        for part in _PARTS
    }
    return {part: names for part, names in found.items() if names}


def _pixels(recipe: Recipe) -> dict[str, list[float]]:
    # Imported where there is something to measure: what reads shards takes a while to import.
    from bigbatch.data.index import open_index
    from bigbatch.data.staging import is_url

    data = recipe.data
    if is_url(data.path):
        raise UserError(
            f"augment.{_wanted(recipe)['augment'][0]}: measured reads many images of {data.path} "
            "before the start; measure a copy here by `bigbatch inspect SHARDS --stats`, and write "
            "the numbers"
        )
    root = Path(data.path) / data.train
    return _measured(root, open_index(root).hash, data.channels)


def _targets(recipe: Recipe) -> dict[str, list[float]]:
    """Of the training split's targets, which stand in its index."""
    from bigbatch.data.targets import mean_and_std

    index = _training_index(recipe.data)
    if index.target is None:
        raise UserError(
            f"loss {recipe.loss.name} learns targets, and {index.place} has none; write them by "
            "`bigbatch shard SOURCE DEST --target COLUMN`, or take a classifier's loss, such as "
            "cross_entropy"
        )
    mean, std = mean_and_std(index.target, index.place)
    return {"mean": mean, "std": std}


def _training_index(data: Any) -> Any:
    from bigbatch.data.index import open_index
    from bigbatch.data.remote import open_remote, remote_at
    from bigbatch.data.staging import is_url

    if is_url(data.path):
        url = f"{data.path.rstrip('/')}/{data.train}"
        return open_remote(remote_at(url, data.cache, data.cache_gb))
    return open_index(Path(data.path) / data.train)


@cache
def _measured(root: Path, index: str, channels: int) -> dict[str, list[float]]:
    """Mean and std of the split whose index has this hash; once in a process."""
    from bigbatch.data.writing.pixel_stats import IMAGES, measure

    threads = len(os.sched_getaffinity(0))
    found = measure(root, images=IMAGES, channels=channels, threads=threads)
    augment = found.recipe(pca=False)["augment"]
    notice(
        f"of {found.images:,} of {found.of:,} training images: augment.mean = {augment['mean']}, "
        f"std = {augment['std']}"
    )
    return {name: augment[name] for name in ("mean", "std")}
