"""From encoded bytes to uint8 pixels, upright, gray or RGB."""

import io
import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError, features

from bigbatch.data.pixels import orientation, upright
from bigbatch.data.read import BadSample

Pixels = npt.NDArray[np.uint8]  # [H, W, C]

MAX_BYTES = 100_000_000  # of one encoded image
MAX_PIXELS = 89_478_485  # Pillow's own limit; a larger image is taken for a decompression bomb
# Nothing else is tried: Pillow has decoders that start other programs.
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF"]  # of a GIF, the first picture
if "avif" in features.modules and features.check_module("avif"):  # Pillow 11.3
    FORMATS.append("AVIF")
LFS_POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched
LONGEST = 8  # times the training size, that the side of an image may be
_SEGMENT = struct.Struct(">BBH")  # of a JPEG: 255, marker, length
_FRAME = struct.Struct(">HHB")  # height, width, colours
_FRAME_STARTS = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive


class Jpeg(NamedTuple):
    """A JPEG whose header was read, of [height, width] pixels."""

    height: int
    width: int
    data: bytes


def open_pixels(data: bytes, channels: int) -> Jpeg | Pixels:
    """The usual JPEG with its size, so that `fill` can decode it in place; else its pixels.

    Raises BadSample where the bytes are no image, or too large a one.
    """
    try:
        if data[:2] == b"\xff\xd8":
            jpeg = open_jpeg(data)
            if jpeg is not None:
                return jpeg
        return _pillow(data, channels)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like; the bytes are at fault
        raise _bad(error) from None


def fill(pixels: Pixels, jpeg: Jpeg, factor: int) -> None:
    """Decode, reduced by `factor` (1, 2, 4 or 8), into `pixels`. Raises BadSample.

    `pixels` is C-contiguous uint8 [ceil(height / factor), ceil(width / factor), channels].
    """
    height, width, channels = pixels.shape
    try:
        simplejpeg.decode_jpeg(
            jpeg.data,
            colorspace="GRAY" if channels == 1 else "RGB",
            min_height=height,
            min_width=width,
            buffer=pixels,
        )
    except ValueError:
        # It does not tell harmless oddities, such as bytes between segments, from an image
        # that breaks off. Pillow does, at the same size and nearly the same pixels.
        try:
            image = _open(jpeg.data)
            image.draft(None, (image.width // factor, image.height // factor))
            pixels[:] = _array(image, channels)
        except MemoryError:
            raise
        except Exception as error:
            raise _bad(error) from None


def size_after(jpeg: Jpeg, factor: int) -> tuple[int, int]:
    """Height and width of a JPEG that is reduced by `factor`."""
    return -(-jpeg.height // factor), -(-jpeg.width // factor)


def shrink(pixels: Pixels, factor: int) -> Pixels:
    """The mean of each square of factor x factor pixels; those at the edges may be smaller."""
    if factor == 1:
        return pixels
    channels = pixels.shape[2]
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    return _array(image.reduce(factor), channels)


def whole_factor(height: int, width: int, image_size: int) -> int:
    """By how much to reduce an image of which any part may be seen: a power of two.

    The short side stays at or above twice `image_size`, except that no side is longer than
    eight times that: one panorama must not blow up the memory of its batch.
    """
    factor = 1
    # Halves only: libjpeg-turbo has no SIMD for 7/8, 6/8, 5/8 and 3/8, which take longer
    # than the whole image.
    while factor < 8 and min(height, width) >= 4 * factor * image_size:
        factor *= 2
    while max(height, width) > LONGEST * factor * image_size:
        factor *= 2
    return factor


def decode(data: bytes, *, image_size: int, channels: int) -> Pixels:
    """Decode to uint8 [H, W, channels], reduced by `whole_factor`. Raises BadSample."""
    opened = open_pixels(data, channels)
    height, width = opened[:2] if isinstance(opened, Jpeg) else opened.shape[:2]
    return reduced(opened, whole_factor(height, width, image_size), channels)


def reduced(opened: Jpeg | Pixels, factor: int, channels: int) -> Pixels:
    """The pixels of an image, reduced by a power of two. Raises BadSample."""
    if not isinstance(opened, Jpeg):
        return shrink(opened, factor)
    scale = min(factor, 8)
    pixels = np.empty((*size_after(opened, scale), channels), np.uint8)
    fill(pixels, opened, scale)
    return shrink(pixels, factor // scale)


def open_jpeg(data: bytes) -> Jpeg | None:
    """The size in a JPEG's header (ITU-T T.81, B.2); None where Pillow must decode it.

    simplejpeg reads a header, too, but says nothing of EXIF, so the segments are walked anyway.
    """
    at = 2
    while at + 10 <= len(data):
        start, marker, length = _SEGMENT.unpack_from(data, at)
        if start != 0xFF:
            break
        if marker in _FRAME_STARTS:
            height, width, colours = _FRAME.unpack_from(data, at + 5)
            _check_pixels(width, height)
            usual = colours in (1, 3) and height > 0 < width  # neither CMYK nor damaged
            return Jpeg(height, width, data) if usual else None
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\x00\x00" and _rotated(data):
            return None
        at += 2 + length
    return None


def _rotated(data: bytes) -> bool:
    return orientation(_open(data)) != 1


def _open(data: bytes) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadSample(no_image(data) if data else "0 bytes") from None
    _check_pixels(*image.size)
    return image


def no_image(data: bytes) -> str:
    """What bytes are that no decoder knows."""
    if data.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the image itself; run `git lfs pull` where it comes from"
    return f"not an image (it starts with {data[:8]!r})" if data else "the file is empty"


def _pillow(data: bytes, channels: int) -> Pixels:
    return _array(upright(_open(data)), channels)


def _array(image: Image.Image, channels: int) -> Pixels:
    converted = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(converted).reshape(image.height, image.width, channels)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadSample(f"{width} x {height} pixels; the limit is {MAX_PIXELS:,}")


def _bad(error: Exception) -> BadSample:
    if isinstance(error, BadSample):
        return error
    return BadSample(f"cannot be decoded: {error or type(error).__name__}")
