"""A picture of the mistakes that were made with most confidence."""

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

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

_MOST, _COLUMNS = 24, 6
_CELL, _TEXT, _GAP = 150, 36, 12  # pixels: the side of an image, the lines above it, between them
_INK, _MUTED = "#1c1c1c", "#666666"


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
        _grid(_look(ensemble, listing.index, chosen), lines).save(content, "PNG")
        write_atomically(path, content.getvalue())
    return len(wrong)


def _grid(images: Sequence[npt.NDArray[np.uint8]], lines: Sequence[tuple[str, str]]) -> Image.Image:
    """Images under two lines of text each. By Pillow: matplotlib would take seconds."""
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    wide, high = _CELL + _GAP, _CELL + _TEXT + _GAP
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for place, (image, (said, truth)) in enumerate(zip(images, lines, strict=True)):
        left = _GAP + place % columns * wide
        top = _GAP + place // columns * high
        draw.text((left, top), _fitting(said, font), _INK, font)
        draw.text((left, top + _TEXT // 2), _fitting(truth, font), _MUTED, font)
        # Small images stay as sharp as their pixels are.
        longest = max(image.shape[:2])
        how = Image.Resampling.NEAREST if longest < _CELL else Image.Resampling.LANCZOS
        height, width = (max(1, round(side * _CELL / longest)) for side in image.shape[:2])
        sheet.paste(Image.fromarray(image).resize((width, height), how), (left, top + _TEXT))
    return sheet


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """matplotlib's, which knows many scripts."""
    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(path, 13)
    return ImageFont.load_default(13)


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, cut to the width of an image."""
    if font.getlength(text) <= _CELL:
        return text
    while text and font.getlength(f"{text}...") > _CELL:
        text = text[:-1]
    return f"{text}..."


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
