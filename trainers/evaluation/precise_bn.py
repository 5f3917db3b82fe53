"""Precise BatchNorm: running statistics made anew, for the weights that are evaluated.

Statistics that training blends in step by step still hold what older weights made, and in the
first steps what they started from. Those of the weights as they are, over some training images,
are what an evaluation means (Wu and Johnson 2021, arXiv:2105.07576, section 3; PyCls,
compute_precise_bn_stats: plain means over batches of their means and variances).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.configs.schema import Recipe
from bigbatch.configs.timeline import Timeline
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import BatchPlan, MicroBatch
from bigbatch.data.kept import KeptBatches
from bigbatch.trainers.engine import Engine
from bigbatch.trainers.evaluation.evaluate import FEW_IMAGES, autocast
from bigbatch.trainers.models.batch_stats import (
    averaged_layers,
    recompute_statistics,
    running_statistics,
)


@dataclass(frozen=True)
class PreciseBatchNorm:
    """Makes running statistics of a model's weights, from what its recipe trains on.

    The images are the first ones of the run, with the views that step 0 has, at the size that the
    augmenter gives step 0, in whole micro-batches: so statistics do not depend on the world size.
    """

    engine: Engine
    recipe: Recipe
    augmenter: Augmenter
    timeline: Timeline
    # This rank's micro-batches of a plan, decoded as the recipe says.
    batches: Callable[[Recipe, BatchPlan], Iterator[MicroBatch]]
    kept: KeptBatches = field(default_factory=KeptBatches)

    def recompute(self, model: nn.Module, images: int | None = None) -> None:
        """Set the statistics of `model`, from at most `images` images. Collective.

        Else from as many as the recipe says, or an epoch has; always from one micro-batch at
        least. Nothing is done where no layer keeps any.
        """
        if not averaged_layers(model):
            return
        engine, recipe = self.engine, self.recipe
        most = recipe.evaluate.precise_images(self.timeline.epoch_samples)
        images = most if images is None else min(most, images)
        count = -(-images // recipe.micro_batch)
        plan = BatchPlan(
            count * recipe.micro_batch, recipe.micro_batch, engine.rank, engine.world, 0, 1
        )
        if images <= FEW_IMAGES * engine.world:  # sooner decoded here than workers start
            alone = recipe.data.model_copy(update={"workers": 0})
            recipe = recipe.model_copy(update={"data": alone})
        own = len(range(engine.rank, count, engine.world))
        batches = self.kept.through(lambda: self.batches(recipe, plan), own)
        views = (self.augmenter.train(batch)[0] for batch in batches)
        recompute_statistics(
            model, views, count, engine.sum, lambda: autocast(engine.device, recipe.precision)
        )

    @contextmanager
    def applied(
        self, model: nn.Module, step: int, *, snapshot: bool
    ) -> Iterator[dict[str, Tensor]]:
        """Within the block `model` has statistics of its weights; after it its own, bit for bit.

        From no more images than `step` steps have trained on, so that it costs a share of these,
        and fewer where no `snapshot` is kept. Gives copies of the new statistics by name.
        Collective. Raises UserError on every rank where one is not finite: scores, snapshot and
        checkpoint would be of NaN.
        """
        own = running_statistics(model)
        kept = {name: value.clone() for name, value in own.items()}
        try:
            line = self.timeline
            images = line.first(step)
            if not snapshot:
                last = line.batch(max(step - 1, 0)), line.epoch_samples
                images = self.recipe.evaluate.evaluated_images(images, *last)
            self.recompute(model, images)
            if bad := [name for name, value in own.items() if not value.isfinite().all()]:
                raise UserError(
                    f"after step {step} {bad[0]} is not finite when it is made of training images "
                    f"({len(bad)} of {len(own)} running statistics are not): values grow too large "
                    "in the network. Lower optimizer.lr or lengthen schedule.warmup, and start anew"
                )
            yield {name: value.clone() for name, value in own.items()}
        finally:
            for name, value in own.items():
                value.copy_(kept[name])


def check_precise(recipe: Recipe, model: nn.Module) -> None:
    """Raise UserError where precise or faster statistics are asked of a model that keeps none."""
    batch = recipe.global_batch
    if not isinstance(batch, int) and batch.batch_norm != "none" and not averaged_layers(model):
        raise UserError(
            f"global_batch.batch_norm: {batch.batch_norm} moves BatchNorm's running statistics, "
            f"and {recipe.model.name} keeps none; set it to none"
        )
    if recipe.evaluate.precise_bn == "always" and not averaged_layers(model):
        raise UserError(
            f"evaluate.precise_bn: always needs BatchNorm's running statistics, and "
            f"{recipe.model.name} keeps none; set it to auto or never, or choose another model"
        )
