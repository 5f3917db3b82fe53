"""Checking images on their way into shards, and making large ones smaller."""

import io
import warnings

from PIL import Image, ImageOps

from bigbatch.data.decode import FORMATS, MAX_BYTES, MAX_PIXELS

# Pillow's name of each format that is read, and the extension that it gets in a shard.
_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with further pictures behind it, as some cameras write
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "PPM": "ppm",
    "TIFF": "tif",
}
# Before Lanczos, a JPEG may be decoded at a fraction of its size as long as this many times
# the target is left; Pillow's documentation calls the result almost indistinguishable at 3.
_DRAFT_GAP = 3


def prepare(data: bytes, short_side: int | None, quality: int) -> tuple[bytes, str]:
    """An encoded image as it goes into a shard, and its extension.

    Its bytes stay as they are, unless its short side is above `short_side` pixels; then it
    is turned upright as its EXIF data say, reduced by Lanczos, and written as JPEG at
    `quality` where JPEG can hold it (8-bit gray or colour, no transparency), else as PNG.
    Every image is decoded once, so that one which is damaged is found here. Raises OSError
    for what cannot be decoded.
    """
    image = open_image(data)
    try:
        if short_side is None or min(image.size) <= short_side:
            # At an eighth of its size, all entropy-coded data of a JPEG are still read.
            image.draft("L", (1, 1))
            image.load()
            return data, _EXTENSIONS[str(image.format)]
        scale = short_side / min(image.size)
        width, height = (max(short_side, round(side * scale)) for side in image.size)
        image.draft(None, (width * _DRAFT_GAP, height * _DRAFT_GAP))
        image.load()
        return _reduce(image, (width, height), quality)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # decoders raise what they like; the bytes are at fault
        raise OSError(f"cannot be decoded: {error or type(error).__name__}") from None


def open_image(data: bytes) -> Image.Image:
    """Read an image's header; OSError where it is none of the formats, or too large."""
    if len(data) > MAX_BYTES:
        raise OSError(f"{len(data):,} encoded bytes; the limit is {MAX_BYTES:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about large images: we have our own limit
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        what = f"not an image (it starts with {data[:8]!r})" if data else "the file is empty"
        raise OSError(what) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"cannot be decoded: {error or type(error).__name__}") from None
    if image.width * image.height > MAX_PIXELS:
        raise OSError(f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS:,}")
    return image


def _reduce(image: Image.Image, size: tuple[int, int], quality: int) -> tuple[bytes, str]:
    if image.mode == "1":  # Lanczos makes values in between, which these modes cannot hold
        image = image.convert("L")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode == "CMYK":
        image = image.convert("RGB")
    image = ImageOps.exif_transpose(image.resize(size, Image.Resampling.LANCZOS))
    file = io.BytesIO()
    if image.mode in ("L", "RGB"):
        image.save(file, "JPEG", quality=quality)
        return file.getvalue(), "jpg"
    image.save(file, "PNG")
    return file.getvalue(), "png"
