"""How strongly each class is augmented, by what the training data holds of it. Free of torch."""

import numpy as np

from bigbatch.configs.errors import UserError
from bigbatch.configs.schema import Recipe
from bigbatch.data.index import Index


def class_strengths(
    recipe: Recipe, classes: tuple[str, ...], train: Index | None
) -> tuple[float, ...] | None:
    """The share of each class's images that an operation changes; None where it is all of them.

    `train` is the index of the training split. Raises UserError where a list does not fit.
    """
    config = recipe.augment.class_strength
    if config is None:
        return None
    if isinstance(config, list):
        if len(config) != len(classes):
            raise UserError(
                f"augment.class_strength has {len(config)} values, and the data {len(classes)} "
                "classes; give one for each, in the order of classes.txt"
            )
        return tuple(config)
    assert train is not None  # the recipe refuses a stream
    counts = train.class_counts
    rarest = counts[counts > 0].min()
    shares = (rarest / np.maximum(counts, rarest)) ** config.alpha
    return tuple(np.maximum(shares, config.least).tolist())
