"""From encoded bytes to uint8 pixels, upright, gray or RGB."""

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from bigbatch.data.read import BadSample

Pixels = npt.NDArray[np.uint8]  # [H, W, C]

MAX_BYTES = 100_000_000  # of one encoded image
MAX_PIXELS = 89_478_485  # Pillow's own limit; a larger image is taken for a decompression bomb
# Nothing else is tried: Pillow has decoders that start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
_ORIENTATION = 0x0112  # EXIF tag
_IMAGE_MARKERS = (0xC0, 0xC1, 0xC2, 0xDA)  # of a JPEG: start of frame, start of scan
# Wider or taller than this many times the training size, an image is shrunk as a whole.
_LONGEST = 8


class Jpeg(NamedTuple):
    """A JPEG whose header was read: it will have [height, width] pixels."""

    height: int
    width: int
    factor: int  # by which it is reduced: 1, 2, 4 or 8
    data: bytes


def open_pixels(data: bytes, *, image_size: int, channels: int) -> Jpeg | Pixels:
    """The usual JPEG with its size, so that `fill` can decode it in place; else its pixels.

    An image is reduced by a whole factor as long as its short side stays at or above twice
    `image_size`. Raises BadSample where the bytes are no image, or too large a one.
    """
    try:
        if data[:2] == b"\xff\xd8":
            jpeg = _open_jpeg(data, 2 * image_size)
            if jpeg is not None and max(jpeg.height, jpeg.width) <= _LONGEST * image_size:
                return jpeg
        return _pillow(data, image_size, channels)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like; the bytes are at fault
        raise _bad(error) from None


def fill(pixels: Pixels, jpeg: Jpeg, channels: int) -> None:
    """Decode into `pixels`, C-contiguous uint8 [height, width, channels]. Raises BadSample."""
    colorspace = "GRAY" if channels == 1 else "RGB"
    try:
        simplejpeg.decode_jpeg(
            jpeg.data,
            colorspace=colorspace,
            min_height=jpeg.height,
            min_width=jpeg.width,
            buffer=pixels,
        )
    except ValueError:
        # It does not tell harmless oddities, such as bytes between segments, from an image
        # that breaks off. Pillow does, at the same size and nearly the same pixels.
        try:
            image = _open(jpeg.data)
            image.draft(None, (image.width // jpeg.factor, image.height // jpeg.factor))
            pixels[:] = _array(image, channels)
        except MemoryError:
            raise
        except Exception as error:
            raise _bad(error) from None


def decode(data: bytes, *, image_size: int, channels: int) -> Pixels:
    """Decode to uint8 [H, W, channels]: `open_pixels` and `fill` in one. Raises BadSample."""
    opened = open_pixels(data, image_size=image_size, channels=channels)
    if not isinstance(opened, Jpeg):
        return opened
    pixels = np.empty((opened.height, opened.width, channels), np.uint8)
    fill(pixels, opened, channels)
    return pixels


def _open_jpeg(data: bytes, short_side: int) -> Jpeg | None:
    """Size after the DCT-scaled decode; None where Pillow must do it."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(width, height)
    if colours in ("CMYK", "YCCK") or _orientation(data) != 1:
        return None
    # Halves only: libjpeg-turbo has no SIMD for 7/8, 6/8, 5/8 and 3/8, which take longer
    # than the whole image.
    factor = 1
    while factor < 8 and min(height, width) >= 2 * factor * short_side:
        factor *= 2
    return Jpeg(-(-height // factor), -(-width // factor), factor, data)


def _orientation(data: bytes) -> int:
    """The EXIF orientation. Most images have no EXIF segment, which takes no time to see."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] not in _IMAGE_MARKERS:
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\x00\x00":
            return int(_open(data).getexif().get(_ORIENTATION, 1))
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 1


def _open(data: bytes) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        what = f"not an image (it starts with {data[:8]!r})" if data else "0 bytes"
        raise BadSample(what) from None
    _check_pixels(*image.size)
    return image


def _pillow(data: bytes, image_size: int, channels: int) -> Pixels:
    image = _open(data)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    image = image.convert("L" if channels == 1 else "RGB")
    factor = max(
        min(image.size) // (2 * image_size),
        # One panorama must not blow up the memory of its batch.
        -(-max(image.size) // (_LONGEST * image_size)),
    )
    return _array(image.reduce(factor) if factor > 1 else image, channels)


def _array(image: Image.Image, channels: int) -> Pixels:
    converted = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(converted).reshape(image.height, image.width, channels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray to 8 bits; Pillow's own conversion cuts off instead of scaling."""
    values = np.asarray(image, np.float64)
    scale = 255 / 65535 if image.mode.startswith("I") else 1.0
    return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadSample(f"{width} x {height} pixels; the limit is {MAX_PIXELS:,}")


def _bad(error: Exception) -> BadSample:
    if isinstance(error, BadSample):
        return error
    return BadSample(f"cannot be decoded: {error or type(error).__name__}")
