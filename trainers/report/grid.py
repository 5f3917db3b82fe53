"""Pictures of many images in rows, with what there is to say of each above it."""

import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

_CELL, _TEXT, _GAP = 150, 36, 12  # pixels: the side of an image, the lines above it, between them
_INK, _MUTED, _MARK = "#1c1c1c", "#666666", "#d62728"


def grid(
    images: Sequence[npt.NDArray[np.uint8]],
    lines: Sequence[tuple[str, str]],
    columns: int = 6,
    marked: Collection[int] = (),
) -> Image.Image:
    """Images [H, W] or [H, W, 3] under two lines of text each, those at `marked` places framed.

    By Pillow: matplotlib would take seconds.
    """
    columns = min(columns, len(images))
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
        if place in marked:
            corner = left + width + 3, top + _TEXT + height + 3
            draw.rectangle((left - 4, top + _TEXT - 4, *corner), outline=_MARK, width=4)
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
