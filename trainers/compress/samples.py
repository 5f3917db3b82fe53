"""Images of the training split by which weights and channels are scored, and int8 is calibrated."""

import torch

from bigbatch.configs.errors import UserError
from bigbatch.configs.size import height_width
from bigbatch.data.batch import Decoding
from bigbatch.data.index import Index, draw_samples
from bigbatch.data.loader import eval_batches
from bigbatch.trainers.compress.pruning import Batch
from bigbatch.trainers.ensemble.members import Member
from bigbatch.trainers.models.build import build_augmenter

_BATCH = 32


def training_images(member: Member, index: Index, count: int) -> list[Batch]:
    """`count` images, or all there are, as evaluation sees them, in batches on the CPU.

    Which ones depends on the recipe's seed and the number of samples alone; unreadable ones
    are left out. Raises UserError where none is left.
    """
    recipe = member.recipe
    augmenter = build_augmenter(recipe, len(member.classes), torch.device("cpu"))
    decoding = Decoding(
        image_size=max(height_width(recipe.eval_size)),
        channels=recipe.data.channels,
        workers=0,
        threads=recipe.data.threads,
        view=augmenter.eval_view,
    )
    few = draw_samples(index, count, recipe.seed, "compress")
    batches = eval_batches(few, decoding, batch=_BATCH, rank=0, world=1, leave_out_bad=True)
    found = [(augmenter.evaluate(b), b.labels) for b in batches if len(b.samples)]
    if not found:
        raise UserError(f"{index.place} has no image that could be read; repair the shards")
    return found
