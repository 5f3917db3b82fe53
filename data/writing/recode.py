"""Checking images on their way into shards, and making large ones smaller."""

import io
import math
import threading
import warnings

from PIL import Image

from bigbatch.data.decode import (
    FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    Jpeg,
    no_image,
    open_jpeg,
    reduced,
)
from bigbatch.data.pixels import upright
from bigbatch.data.read import BadSample

# Pillow's name of each format that is read, and the extension that it gets in a shard.
_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with further pictures behind it, as some cameras write
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "PPM": "ppm",
    "TIFF": "tif",
    "GIF": "gif",
    "AVIF": "avif",
}
# Before Lanczos, a JPEG may be decoded at a fraction of its size as long as this many times
# the target is left; Pillow's documentation calls the result almost indistinguishable at 3.
_DRAFT_GAP = 3
_FILTERS = threading.Lock()  # of warnings: they are the process's, not a thread's


def prepare(data: bytes, short_side: int | None, quality: int) -> tuple[bytes, str]:
    """An encoded image as it goes into a shard, and its extension.

    Its bytes stay as they are, unless its short side is above `short_side` pixels; then it
    is turned upright as its EXIF data say, reduced by Lanczos, and written as JPEG at
    `quality` where it has 8 bits and no transparency, else as PNG, of 8 bits as well. Every
    image is decoded once, by what decodes it for training, so that one which is damaged, or
    whose values have no certain range, is found here. Raises OSError for what cannot be used.
    """
    try:
        if _is_usual_jpeg(data, short_side):
            return data, "jpg"
        image = open_image(data)
        kind = str(image.format)
        if short_side is None or min(image.size) <= short_side:
            if kind in ("JPEG", "MPO"):  # turned, or of four colours
                reduced(Jpeg(image.height, image.width, data), 8, channels=1)
            else:
                upright(image)
            return data, _EXTENSIONS[kind]
        scale = _DRAFT_GAP * short_side / min(image.size)
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        return _reduce(image, short_side, quality)
    except BadSample as error:
        raise OSError(str(error)) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # decoders raise what they like; the bytes are at fault
        raise OSError(f"cannot be decoded: {error or type(error).__name__}") from None


def _is_usual_jpeg(data: bytes, short_side: int | None) -> bool:
    """Whether it is a JPEG that keeps its bytes, as most are; decoded without Pillow's header."""
    usual = data[:2] == b"\xff\xd8" and len(data) <= MAX_BYTES
    jpeg = open_jpeg(data) if usual else None
    if jpeg is None or (short_side is not None and min(jpeg[:2]) > short_side):
        return False
    reduced(jpeg, 8, channels=1)  # at an eighth of its size, all of its data are read
    return True


def open_image(data: bytes) -> Image.Image:
    """Read an image's header; OSError where it is none of the formats, or too large."""
    if len(data) > MAX_BYTES:
        raise OSError(f"{len(data):,} encoded bytes; the limit is {MAX_BYTES:,}")
    try:
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about large images: we have our own limit
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise OSError(no_image(data)) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"cannot be decoded: {error or type(error).__name__}") from None
    if image.width * image.height > MAX_PIXELS:
        raise OSError(f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS:,}")
    return image


def _reduce(image: Image.Image, short_side: int, quality: int) -> tuple[bytes, str]:
    # Lanczos makes values in between, which the modes 1, P and PA cannot hold.
    deep = image.mode.startswith("I") or image.mode == "F"
    image = upright(image)
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode == "CMYK":
        image = image.convert("RGB")
    scale = short_side / min(image.size)
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    image.info.pop("exif", None)  # it is upright now
    file = io.BytesIO()
    if image.mode in ("L", "RGB") and not deep:
        image.save(file, "JPEG", quality=quality)
        return file.getvalue(), "jpg"
    image.save(file, "PNG")
    return file.getvalue(), "png"
