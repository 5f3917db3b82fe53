"""Precise BatchNorm: running statistics made anew, for the weights that are evaluated.

Statistics that training blends in step by step still hold what older weights made, and in the
first steps what they started from. Those of the weights as they are, over some training images,
are what an evaluation means (Wu and Johnson 2021, arXiv:2105.07576, section 3; PyCls,
compute_precise_bn_stats: plain means over batches of their means and variances).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bigbatch.configs.schema import Recipe
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import BatchPlan
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.evaluation.evaluate import FEW_IMAGES, autocast
from bigbatch.trainers.job import training_batches
from bigbatch.trainers.models.batch_stats import (
    averaged_layers,
    recompute_statistics,
    running_statistics,
)
from bigbatch.trainers.planning.inputs import Inputs


def recompute(
    model: nn.Module,
    engine: Engine,
    recipe: Recipe,
    inputs: Inputs,
    augmenter: Augmenter,
    images: int | None = None,
) -> None:
    """Set a model's running statistics to those of its weights. Collective.

    Over about `images` training images (the recipe's number; an epoch's at most), in whole
    micro-batches: the first ones of the run, with the views that step 0 has, so that the result
    depends on neither step nor world size. Nothing is done where there are no such statistics.
    """
    if not averaged_layers(model):
        return
    images = min(images or recipe.evaluate.precise_bn_images, inputs.epoch_samples)
    count = -(-images // recipe.micro_batch)
    plan = BatchPlan(
        count * recipe.micro_batch, recipe.micro_batch, engine.rank, engine.world, 0, 1
    )
    if images <= FEW_IMAGES * engine.world:  # sooner decoded here than workers start
        alone = recipe.data.model_copy(update={"workers": 0})
        recipe = recipe.model_copy(update={"data": alone})
    batches = training_batches(recipe, inputs, plan, augmenter.view, engine.device)
    views = (augmenter.train(batch)[0] for batch in batches)
    recompute_statistics(
        model, views, count, engine.sum, lambda: autocast(engine.device, recipe.precision)
    )


@contextmanager
def precise(
    model: nn.Module, engine: Engine, recipe: Recipe, inputs: Inputs, augmenter: Augmenter
) -> Iterator[dict[str, Tensor]]:
    """Within the block `model` has the statistics of `recompute`; after it its own, bit for bit.

    Gives copies of the new ones by name. Collective.
    """
    own = running_statistics(model)
    kept = {name: value.clone() for name, value in own.items()}
    try:
        recompute(model, engine, recipe, inputs, augmenter)
        yield {name: value.clone() for name, value in own.items()}
    finally:
        for name, value in own.items():
            value.copy_(kept[name])
