"""From encoded bytes to uint8 pixels."""

import io
import warnings

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps

from bigbatch.data.read import BadSample

Pixels = npt.NDArray[np.uint8]  # [H, W, C]

MAX_PIXELS = 100_000_000  # a larger image is taken for a decompression bomb
_ORIENTATION = 0x0112  # EXIF tag
# Wider or taller than this many times the training size, an image is shrunk as a whole.
_LONGEST = 8


def decode(data: bytes, *, image_size: int, channels: int) -> Pixels:
    """Decode to uint8 [H, W, channels], upright, gray or RGB.

    An image whose short side is over twice `image_size` is decoded at a smaller scale, but
    its short side stays at or above twice `image_size`. Raises BadSample.
    """
    if not data:
        raise BadSample("0 bytes")
    try:
        if data[:2] == b"\xff\xd8":
            pixels = _jpeg(data, 2 * image_size, channels)
            if pixels is not None:
                return _bounded(pixels, image_size)
        return _bounded(_pillow(data, 2 * image_size, channels), image_size)
    except BadSample:
        raise
    except Exception as error:  # decoders raise what they like; the bytes are at fault
        raise BadSample(f"cannot be decoded: {type(error).__name__}: {error}") from None


def _jpeg(data: bytes, short_side: int, channels: int) -> Pixels | None:
    """simplejpeg's decode, scaled in the DCT; None where Pillow must do it."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(width, height)
    if colours in ("CMYK", "YCCK"):
        return None
    pixels: Pixels = simplejpeg.decode_jpeg(
        data,
        colorspace="GRAY" if channels == 1 else "RGB",
        min_height=short_side if min(height, width) > short_side else 0,
        min_width=short_side if min(height, width) > short_side else 0,
    )
    return _upright(pixels, data)


def _upright(pixels: Pixels, data: bytes) -> Pixels:
    """Turn by the EXIF orientation; few images have one, so look for the marker first."""
    if b"Exif\x00\x00" not in data[:65536]:
        return pixels
    turn = Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1)
    if turn in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _pillow(data: bytes, short_side: int, channels: int) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own bomb warning: _check_pixels is stricter
        image: Image.Image = Image.open(io.BytesIO(data))
        _check_pixels(*image.size)
        image.load()
    image = ImageOps.exif_transpose(image) or image
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    image = image.convert("L" if channels == 1 else "RGB")
    factor = min(image.size) // short_side
    if factor > 1:
        image = image.reduce(factor)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray to 8 bits; Pillow's own conversion cuts off instead of scaling."""
    values = np.asarray(image, np.float64)
    scale = 255 / 65535 if image.mode.startswith("I") else 1.0
    return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadSample(f"{width} x {height} pixels; the limit is {MAX_PIXELS:,}")


def _bounded(pixels: Pixels, image_size: int) -> Pixels:
    """Shrink what is still very long, so that one panorama cannot blow up a batch's canvas."""
    limit = _LONGEST * image_size
    longest = max(pixels.shape[:2])
    if longest <= limit:
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image = image.reduce(-(-longest // limit))
    return np.asarray(image).reshape(image.height, image.width, pixels.shape[2])
