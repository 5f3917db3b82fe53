"""A picture of the mistakes that were made with most confidence."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigbatch.configs.files import write_atomically
from bigbatch.configs.size import height_width
from bigbatch.data.augment.crop import crop_resize
from bigbatch.data.batch import Decoding
from bigbatch.data.geometry import into_frames
from bigbatch.data.index import Index, some_samples
from bigbatch.data.listing import Listing
from bigbatch.data.loader import eval_batches
from bigbatch.trainers.ensemble.folder import Ensemble
from bigbatch.trainers.evaluation.outcomes import Outcomes
from bigbatch.trainers.inference.looks import view_of
from bigbatch.trainers.report.grid import grid

_MOST = 24


def draw_worst(ensemble: Ensemble, listing: Listing, found: Outcomes, path: Path) -> int:
    """Draw the mistakes that were made with most confidence, as the first member sees them.

    Returns how many mistakes there are; none makes no picture.
    """
    wrong = np.flatnonzero(~found.correct)
    chosen = wrong[np.lexsort((wrong, -found.confidence[wrong]))][:_MOST]
    if len(chosen):
        lines = [
            (f"{ensemble.classes[found.predicted[i]]} {found.confidence[i]:.0%}",
             f"is {ensemble.classes[found.label[i]]}")
            for i in chosen
        ]  # fmt: skip
        content = io.BytesIO()
        grid(_look(ensemble, listing.index, chosen), lines).save(content, "PNG")
        write_atomically(path, content.getvalue())
    return len(wrong)


def _look(
    ensemble: Ensemble, index: Index, samples: npt.NDArray[np.int64]
) -> list[npt.NDArray[np.uint8]]:
    """What the first member sees of samples: arrays [H, W] or [H, W, 3]."""
    recipe = ensemble.members[0].recipe
    view = view_of(recipe)
    few = some_samples(index, samples)
    decoding = Decoding(
        max(height_width(view.out)), recipe.data.channels, workers=0, threads=1, view=view
    )
    (batch,) = eval_batches(few, decoding, batch=len(samples), rank=0, world=1)
    frames = batch.frames
    sizes = np.stack([frames["full_height"], frames["full_width"]], 1)
    boxes = into_frames(view.boxes(sizes, 0, 0), frames)
    images = crop_resize(batch, boxes, view.out).permute(0, 2, 3, 1).numpy()
    pixels = (images * 255).round().astype(np.uint8)
    return [image[..., 0] if image.shape[2] == 1 else image for image in pixels]
