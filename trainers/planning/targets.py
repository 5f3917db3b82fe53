"""What a recipe's network gives, and whether the data has what it learns. Free of torch."""

from collections.abc import Mapping

from bigbatch.configs.augment_ops import Geometric
from bigbatch.configs.errors import UserError
from bigbatch.configs.schema import Recipe
from bigbatch.configs.targets import learns_numbers, learns_targets
from bigbatch.data.classes import UNLABELLED
from bigbatch.data.index import Index
from bigbatch.data.targets import check_distributions


def outputs_of(recipe: Recipe, splits: Mapping[str, Index]) -> tuple[str, ...]:
    """The names of what the network gives: classes, or numbers.

    Raises UserError where a split lacks what the recipe's loss learns.
    """
    classes, name = splits["val"].classes, recipe.loss.name
    if not learns_targets(recipe):
        if classes == UNLABELLED and splits["val"].target is not None:
            raise UserError(
                f"{splits['val'].place} has targets and no labels, and loss {name} learns labels; "
                "set loss.name to l1, l2, smooth_l1 or tukey, or label the samples"
            )
        return classes
    width = None
    for index in splits.values():
        if index.target is None:
            raise UserError(
                f"loss {name} learns targets, and {index.place} has none; write them by `bigbatch "
                "shard SOURCE DEST --target COLUMN`, or take a classifier's loss, such as "
                "cross_entropy"
            )
        own = index.target.shape[1]
        if width not in (None, own):
            raise UserError(
                f"{index.place} has targets of {own:,} numbers, {splits['val'].place} has others; "
                "write both with one `bigbatch shard`"
            )
        width = own
    assert width is not None
    _check_labels(recipe, classes)
    if not learns_numbers(recipe):
        for index in splits.values():
            assert index.target is not None
            check_distributions(index.target, len(classes), index.place)
        return classes
    for key in ("mean", "std"):
        values = getattr(recipe.loss, key)
        if isinstance(values, list) and len(values) != width:
            raise UserError(
                f"loss.{key} has {len(values):,} numbers, and targets {width:,}; give one for "
                "each, or leave it at measured"
            )
    return ("target",) if width == 1 else tuple(f"target_{k}" for k in range(width))


def _check_labels(recipe: Recipe, classes: tuple[str, ...]) -> None:
    """Raise UserError where a recipe goes by labels that there are not."""
    sampling, strength = recipe.data.sampling.name, recipe.augment.class_strength
    asked = None if sampling == "uniform" else f"data.sampling = {sampling}"
    asked = "augment.class_strength" if strength is not None else asked
    if classes == UNLABELLED and asked is not None:
        remedy = "leave it out" if strength is not None else "set it to uniform"
        raise UserError(f"{asked} goes by labels, and the data has targets alone; {remedy}")


def target_scaling(recipe: Recipe) -> tuple[list[float], list[float]] | None:
    """Mean and std of what targets are learned in; None where labels are learned."""
    if not learns_targets(recipe):
        return None
    scaling: tuple[list[float], list[float]] = getattr(recipe.loss, "scaling", ([0.0], [1.0]))
    return scaling


def moved(recipe: Recipe) -> str | None:
    """What a user should know where images move and their numbers do not."""
    augment = recipe.augment
    moving = [name for name in ("crop", "affine") if getattr(augment, name) is not None]
    moving += ["flip"] if augment.flip else []
    moving += [op.name for op in augment.ops if isinstance(op, Geometric)]
    if not moving or not learns_numbers(recipe):
        return None
    return (
        f"targets stay as they are where {', '.join(moving)} move the image: leave out what would "
        "change them, such as flip for a place or an angle"
    )
