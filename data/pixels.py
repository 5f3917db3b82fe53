"""What Pillow opened -> upright, 8 bits, gray or RGB; or BadSample where the range is unknown.

Files with more than 8 bits do not say which of their values is white. Those whose writer
follows the format are scaled by it; others would come out near-black without a word, and are
refused with their range.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from bigbatch.data.read import BadSample

_ORIENTATION = 0x0112  # EXIF tag
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags (TIFF 6.0)
# How to turn a picture upright, by its orientation (Exif 2.32, 4.6.4).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# 16-bit pictures whose highest value is below a quarter of the range: 14 bits or fewer, such
# as of X-rays and cameras, that were never scaled to 16.
_DARK = 1 << 14


def orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF has it; 1 where there is none, or none that can be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # Pillow raises what it likes; the pixels are none the worse
        return 1


def upright(image: Image.Image) -> Image.Image:
    """Load an image: upright, and of a mode with 8 bits that becomes L or RGB.

    16-bit gray is scaled by 255/65535, 12-bit TIFF by 255/4095, float by 255 where all values
    lie in 0 to 1. Raises BadSample for others, and for 16 bits of which at most 14 are used.
    """
    codec, rawmode = _tile(image)  # forgotten once it is loaded
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(_BITS_PER_SAMPLE, (8,))) if tags else 16 if ";16" in rawmode else 8
    inverted = tags.get(_PHOTOMETRIC) == 0
    image.load()
    turn = _TURNS.get(orientation(image))
    if image.mode == "F":
        image = _from_floats(np.asarray(image), inverted)
    elif image.mode == "I" and image.format == "TIFF":
        values = np.asarray(image)
        signed = "signed " if tags.get(_SAMPLE_FORMAT) in (2, (2,)) else ""
        raise BadSample(
            f"{signed}{bits}-bit integers from {values.min()} to {values.max()}, of which no one "
            "can say what is white; write 8-bit or 16-bit images"
        )
    elif image.mode.startswith("I"):
        # Pillow scales PGM to 16 bits by the highest value that its header declares.
        sure = bits == 12 or codec.startswith("ppm")
        image = _from_integers(np.asarray(image), 4095 if bits == 12 else 65535, sure, inverted)
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow cannot make L of it
    elif bits == 16 and image.mode in ("LA", "RGB", "RGBA"):
        _check_colour(image)
    return image if turn is None else image.transpose(turn)


def _tile(image: Image.Image) -> tuple[str, str]:
    """How Pillow is going to decode: the name of its codec, and the layout of the bytes."""
    tiles: list[Any] = getattr(image, "tile", [])
    if not tiles:
        return "", ""
    layout = tiles[0][3]
    return str(tiles[0][0]), str(layout[0] if isinstance(layout, tuple) else layout)


def _from_floats(values: npt.NDArray[np.float32], inverted: bool) -> Image.Image:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # also NaN
        raise BadSample(
            f"float values from {low:g} to {high:g}; floats are read as 0 to 1; scale them, or "
            "write 8-bit or 16-bit images"
        )
    return Image.fromarray(((1 - values if inverted else values) * 255).round().astype(np.uint8))


def _from_integers(
    values: npt.NDArray[np.integer[Any]], white: int, sure: bool, inverted: bool
) -> Image.Image:
    highest = int(values.max())
    if not sure and 0 < highest < _DARK:
        raise BadSample(
            f"16-bit values from {values.min()} to {highest}, of which white would be {white}; "
            "scale them to all 16 bits, or write 8-bit images"
        )
    scaled = (white - values.astype(np.float64) if inverted else values) * (255 / white)
    return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))


def _check_colour(image: Image.Image) -> None:
    """Pillow keeps the upper 8 of 16 bits: of 12-bit values, 4 bits."""
    highest = int(np.asarray(image.convert("RGB")).max())
    if highest < _DARK >> 8:
        raise BadSample(
            f"16-bit colour, all of its values below {(highest + 1) << 8}, where white would be "
            "65535; scale them to all 16 bits, or write 8-bit images"
        )
