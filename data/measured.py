"""Recipes that leave mean and std to be measured: they are given numbers before a run is made.

So a run's own recipe holds them, and resuming, evaluation and export do not measure again.
"""

import os
from functools import cache
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import parse_recipe
from bigbatch.configs.notices import notice
from bigbatch.configs.schema import Recipe


def with_measured(recipe: Recipe) -> Recipe:
    """The recipe with numbers for each of augment.mean and std that is `measured`.

    They are those of `bigbatch inspect --stats`, of the training split: the same for the same
    shards. Raises UserError where there is no such split here.
    """
    wanted = [name for name in ("mean", "std") if getattr(recipe.augment, name) == "measured"]
    if not wanted:
        return recipe
    # Imported where there is something to measure: what reads shards takes a while to import.
    from bigbatch.data.index import open_index
    from bigbatch.data.staging import is_url

    data = recipe.data
    if is_url(data.path):
        raise UserError(
            f"augment.{wanted[0]}: measured reads many images of {data.path} before the start; "
            "measure a copy here by `bigbatch inspect SHARDS --stats`, and write the numbers"
        )
    root = Path(data.path) / data.train
    values = _measured(root, open_index(root).hash, data.channels)
    tree = recipe.model_dump(mode="json")
    tree["augment"] |= {name: list(values[name]) for name in wanted}
    return parse_recipe(tree, f"with the mean and std of {root}")


def measured_keys(recipe: Recipe) -> tuple[str, ...]:
    """The same numbers as ``key=value``, for who starts processes by a recipe's name."""
    found = with_measured(recipe).augment
    return tuple(
        f"augment.{name}={getattr(found, name)}"
        for name in ("mean", "std")
        if getattr(recipe.augment, name) == "measured"
    )


def as_in(there: Recipe, here: Recipe) -> Recipe:
    """`here` with the numbers of `there`, a run that was made from it, for what is measured."""
    found = {
        name: getattr(there.augment, name)
        for name in ("mean", "std")
        if getattr(here.augment, name) == "measured"
    }
    return here.model_copy(update={"augment": here.augment.model_copy(update=found)})


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
