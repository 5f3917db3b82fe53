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

from bigbatch.data.decode import FORMATS, decode, fill, open_pixels
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


def tiff(values, bits, *, form=1, white_is_zero=False):
    """An uncompressed TIFF of one strip, as other programs write them; gray or RGB."""
    height, width, *colours = values.shape
    colours = colours[0] if colours else 1
    if bits == 12:  # two values in three bytes, the first in the upper bits
        a, b = values.reshape(-1, 2).astype(np.uint16).T
        data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()
    else:
        data = values.tobytes()
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits) if colours == 1 else (258, 3, 3, 8 + 2 + 12 * 10 + 4),
        (259, 3, 1, 1),
        (262, 3, 1, 2 if colours == 3 else 0 if white_is_zero else 1),
        (273, 4, 1, 200),
        (277, 3, 1, colours),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (339, 3, 1, form) if colours == 1 else (339, 3, 3, 8 + 2 + 12 * 10 + 4 + 6),
    ]
    head = struct.pack("<2sHIH", b"II", 42, 8, 10) + b"".join(
        struct.pack("<HHII", *tag) for tag in tags
    )
    more = struct.pack("<I3H3H", 0, bits, bits, bits, form, form, form)
    return (head + more).ljust(200, b"\0") + data


def gray(data):
    return decode(data, image_size=SMALL, channels=1)[..., 0].tolist()


def test_twelve_bits_that_the_file_declares_are_scaled():
    values = np.array([[0, 16, 2048, 4095]], np.uint16)
    assert gray(tiff(values, 12)) == [[0, 1, 128, 255]]
    assert gray(b"P5 4 1 4095\n" + values.astype(">u2").tobytes()) == [[0, 1, 128, 255]]
    dark = np.array([[0, 16, 100, 200]], np.uint16)  # sure, however dark it is
    assert gray(tiff(dark, 12)) == [[0, 1, 6, 12]]
    assert gray(b"P5 4 1 4095\n" + dark.astype(">u2").tobytes()) == [[0, 1, 6, 12]]


def test_floats_from_zero_to_one():
    values = np.array([[0, 0.25, 0.5, 1]], np.float32)
    assert gray(tiff(values, 32, form=3)) == [[0, 64, 128, 255]]
    assert gray(tiff(values, 32, form=3, white_is_zero=True)) == [[255, 191, 128, 0]]


def test_white_is_zero():
    values = np.array([[0, 65535, 257, 32768]], np.uint16)
    assert gray(tiff(values, 16, white_is_zero=True)) == [[255, 0, 254, 127]]


def test_black_has_no_range():
    assert gray(tiff(np.zeros((1, 4), np.uint16), 16)) == [[0] * 4]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            tiff(np.array([[0, 4095]], np.uint16), 16),
            "16-bit values from 0 to 4095, of which white",
        ),
        (tiff(np.array([[5, 16383]], np.uint16), 16), "16-bit values from 5 to 16383"),
        (
            tiff(np.array([[-7, 300]], np.int16), 16, form=2),
            "signed 16-bit integers from -7 to 300",
        ),
        (tiff(np.array([[0, 255]], np.int32), 32, form=2), "signed 32-bit integers from 0 to 255"),
        (tiff(np.array([[0, 255]], np.uint32), 32), "32-bit integers from 0 to 255"),
        (tiff(np.array([[0, 255]], np.float32), 32, form=3), "float values from 0 to 255; floats"),
        (tiff(np.array([[-1, 1]], np.float32), 32, form=3), "float values from -1 to 1"),
        (tiff(np.array([[np.nan, 1]], np.float32), 32, form=3), "float values from nan to nan"),
        (
            tiff(np.full((1, 2, 3), 4095, np.uint16), 16),
            "16-bit colour, all of its values below 4096",
        ),
        (
            tiff(np.full((1, 2, 3), 255, np.uint16), 16),
            "16-bit colour, all of its values below 256",
        ),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_values_without_a_certain_range_are_refused_with_it(data, reason, channels):
    with pytest.raises(BadSample, match=reason):
        decode(data, image_size=SMALL, channels=channels)


def test_sixteen_bits_of_colour():
    values = np.array([[[0, 256, 65535], [30_000, 0, 20_000]]], np.uint16)
    pixels = decode(tiff(values, 16), image_size=SMALL, channels=3)
    assert pixels[0].tolist() == [[0, 1, 255], [117, 0, 78]]


@pytest.mark.parametrize("channels", [1, 3])
def test_lab(channels):
    """As other programs read it: neutral L of 0, 50 and 100 per cent."""
    lightness = Image.fromarray(np.array([[0, 128, 255]], np.uint8))
    neutral = Image.fromarray(np.full((1, 3), 128, np.uint8))
    lab = Image.merge("LAB", [lightness, neutral, neutral])
    pixels = decode(encoded(lab, "TIFF"), image_size=SMALL, channels=channels)
    assert pixels.shape == (1, 3, channels)
    assert close(pixels[0].mean(1), np.array([0, 119, 255]), 2)


@pytest.mark.parametrize("kind", ["GIF", "AVIF"])
def test_more_formats(kind):
    if kind == "AVIF" and kind not in FORMATS:
        pytest.skip("this Pillow reads no AVIF")
    still = encoded(picture(mode="L"), kind)
    assert close(
        decode(still, image_size=SMALL, channels=1), np.asarray(picture(mode="L"))[..., None], 12
    )


def test_exif_that_cannot_be_read_changes_nothing():
    exif = b"Exif\x00\x00" + b"no TIFF header"
    data = jpeg()
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + data[2:]
    assert np.array_equal(
        decode(data, image_size=SMALL, channels=3), decode(jpeg(), image_size=SMALL, channels=3)
    )


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
        (encoded(picture(), "ICO"), "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
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
