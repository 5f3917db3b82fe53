"""From bytes to pixels: formats, orientation, scale, and bytes that are no image."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from bigbatch.data.decode import decode, fill, open_pixels
from bigbatch.data.read import BadSample

SMALL = 1000  # an image_size that no test image needs to be reduced for


def picture(height=40, width=60, mode="RGB"):
    """A smooth picture, so that JPEG keeps it nearly as it is."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [(x * 4) % 256, (y * 6) % 256, (x + y) * 2 % 256]
    smooth = [np.abs(c - 128) * 2 for c in channels]
    image = Image.fromarray(np.stack(smooth, 2).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(height=40, width=60, mode="RGB", **options):
    return encoded(picture(height, width, mode), "JPEG", quality=95, **options)


def close(a, b, tolerance=3):
    return np.abs(a.astype(int) - b.astype(int)).max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(kind):
    data = encoded(picture(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(decode(data, image_size=SMALL, channels=3), np.asarray(picture()))


def test_jpeg_is_decoded_as_simplejpeg_does():
    assert np.array_equal(
        decode(jpeg(), image_size=SMALL, channels=3), simplejpeg.decode_jpeg(jpeg())
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_colour_spaces(mode, channels, progressive):
    data = jpeg(mode=mode, progressive=progressive)
    expected = Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB")
    pixels = decode(data, image_size=SMALL, channels=channels)
    assert pixels.shape == (40, 60, channels)
    assert close(pixels, np.asarray(expected).reshape(pixels.shape))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_png_modes(mode, channels):
    image = picture(mode=mode)
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    pixels = decode(encoded(image, "PNG"), image_size=SMALL, channels=channels)
    assert np.array_equal(pixels, expected.reshape(40, 60, channels))


def test_sixteen_bits_are_scaled_not_cut():
    values = np.array([[0, 256, 257, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = decode(encoded(Image.fromarray(values), kind), image_size=SMALL, channels=3)
        assert pixels[0, :, 0].tolist() == [0, 1, 1, 128, 255]


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(picture(), kind, exif=exif, **({"quality": 95} if kind != "TIFF" else {}))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    pixels = decode(data, image_size=SMALL, channels=3)
    assert pixels.shape == ((60, 40, 3) if turn > 4 else (40, 60, 3))
    assert close(pixels, upright)


def test_jpegs_are_reduced_as_far_as_twice_the_training_size_allows():
    for height, width in [(31, 31), (63, 80), (64, 64), (65, 200), (127, 128), (511, 600)]:
        data = jpeg(height, width)
        assert open_pixels(data, 3)[:2] == (height, width)
        pixels = decode(data, image_size=16, channels=3)
        short = min(pixels.shape[:2])
        assert min(32, height, width) <= short <= 64
        ratio = pixels.shape[0] / pixels.shape[1]
        assert ratio == pytest.approx(height / width, rel=0.1)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_every_size_is_predicted_before_decoding(factor):
    # `fill` needs a buffer of just the right size, and would raise if it were another.
    for height in range(64 * factor, 64 * factor + 2 * factor + 1):
        for width in (64 * factor, 65 * factor + 1, 80 * factor - 1):
            data = jpeg(height, width)
            pixels = np.empty((-(-height // factor), -(-width // factor), 3), np.uint8)
            fill(pixels, open_pixels(data, 3), factor)
            expected = Image.open(io.BytesIO(data))
            expected.draft("RGB", (width // factor, height // factor))
            assert close(pixels, np.asarray(expected), 8)


def test_other_formats_are_reduced_too():
    data = encoded(picture(200, 300), "PNG")
    pixels = decode(data, image_size=32, channels=3)
    assert pixels.shape == (100, 150, 3)
    assert close(pixels, np.asarray(picture(200, 300).reduce(2)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(20, 20_000), (20_000, 20), (1, 1), (1, 3)])
def test_extreme_shapes_stay_bounded(kind, size):
    height, width = size
    pixels = decode(encoded(picture(height, width), kind), image_size=32, channels=3)
    assert min(pixels.shape) >= 1
    assert max(pixels.shape) <= 8 * 32
    if size == (1, 1):
        assert close(pixels, np.asarray(picture(1, 1)))


def test_the_same_bytes_give_the_same_pixels():
    data = jpeg(300, 400)
    first = decode(data, image_size=32, channels=3)
    assert np.array_equal(first, decode(data, image_size=32, channels=3))


# What is no image.


def png_claiming(width, height):
    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_claiming(width, height):
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"hello, this is text named .jpg", "not an image"),
        (b"\xff\xd8 and then text", "not an image"),
        (jpeg()[:600], "cannot be decoded"),
        (jpeg()[:-200], "truncated"),
        (encoded(picture(), "PNG")[:-60], "truncated"),
        (encoded(picture(), "GIF"), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (png_claiming(20_000, 20_000), "pixels"),
        (png_claiming(2**31 - 1, 2**31 - 1), "pixels|large|exceed"),
        (jpeg_claiming(65_500, 65_500), "65500 x 65500 pixels; the limit"),
        (jpeg_claiming(0, 40), "not an image|cannot be decoded"),
        (jpeg_claiming(40, 0), "not an image|cannot be decoded"),
    ],
)
def test_what_is_no_image_is_bad(data, reason):
    with pytest.raises(BadSample, match=reason):
        decode(data, image_size=32, channels=3)


def test_harmless_oddities_are_no_reason():
    data = jpeg()
    assert data.endswith(b"\xff\xd9")
    odd = data[:-2] + b"\x00" * 65 + b"\xff\xd9"  # as several ImageNet files have
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(odd)
    assert close(
        decode(odd, image_size=SMALL, channels=3), decode(data, image_size=SMALL, channels=3)
    )
    assert decode(data + b"trailing", image_size=SMALL, channels=3).shape == (40, 60, 3)


@given(st.binary(max_size=300), st.integers(0, 3), st.integers(0, 10**6))
@example(b"\xff\xd8\xff\xe1\x00\x00", 3, 0)
@settings(max_examples=300, deadline=None)
def test_damage_is_bad_or_decoded_but_never_another_error(noise, kind, where):
    bases = [jpeg(24, 24), encoded(picture(24, 24), "PNG"), encoded(picture(24, 24), "WEBP"), b""]
    data = bytearray(bases[kind])
    at = where % (len(data) + 1)
    data[at : at + len(noise)] = noise
    with suppress(BadSample):
        pixels = decode(bytes(data), image_size=8, channels=3)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
