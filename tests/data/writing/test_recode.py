import contextlib
import io
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bigbatch.data.decode import decode
from bigbatch.data.read import BadSample
from bigbatch.data.writing.recode import prepare


def encode(image: Image.Image, style: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, style, **options)
    return file.getvalue()


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(3)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize(
    ("style", "extension"),
    [
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("BMP", "bmp"),
        ("PPM", "ppm"),
        ("TIFF", "tif"),
        ("GIF", "gif"),
    ],
)
def test_images_that_fit_keep_their_bytes(style: str, extension: str) -> None:
    data = encode(photo(70, 50), style)
    assert prepare(data, None, 90) == (data, extension)
    assert prepare(data, 50, 90) == (data, extension)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((300, 200), (96, 64)), ((200, 300), (64, 96)), ((65, 65), (64, 64)), ((1000, 70), (914, 64))],
)
def test_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    data, extension = prepare(encode(photo(*size), "JPEG"), 64, 90)
    assert extension == "jpg"
    assert Image.open(io.BytesIO(data)).size == expected


@pytest.mark.parametrize(
    ("mode", "style", "extension", "result"),
    [
        ("L", "PNG", "jpg", "L"),
        ("RGB", "PNG", "jpg", "RGB"),
        ("1", "PNG", "jpg", "L"),
        ("P", "PNG", "jpg", "RGB"),
        ("CMYK", "JPEG", "jpg", "RGB"),
        ("RGBA", "PNG", "png", "RGBA"),
        ("LA", "PNG", "png", "LA"),
        ("I;16", "PNG", "png", "L"),
    ],
)
def test_modes(mode: str, style: str, extension: str, result: str) -> None:
    if mode == "I;16":
        ramp = np.linspace(0, 65_535, 90 * 60).reshape(60, 90).astype(np.uint16)
        image = Image.fromarray(ramp)
    else:
        image = photo(90, 60, mode)
    data, found = prepare(encode(image, style), 30, 95)
    reduced = Image.open(io.BytesIO(data))
    assert (found, reduced.mode, reduced.size) == (extension, result, (45, 30))
    if mode == "I;16":
        assert np.asarray(reduced).max() > 60_000 / 257


def test_reduced_pixels_are_lanczos() -> None:
    image = photo(120, 90)
    data, _ = prepare(encode(image), 45, 100)
    expected = np.asarray(image.resize((60, 45), Image.Resampling.LANCZOS), np.float32)
    found = np.asarray(Image.open(io.BytesIO(data)), np.float32)
    assert np.abs(found - expected).mean() < 2  # JPEG at quality 100


def test_large_jpegs_may_be_decoded_at_a_fraction() -> None:
    image = photo(1600, 1200)
    data, _ = prepare(encode(image, "JPEG", quality=95), 60, 100)
    expected = np.asarray(image.resize((80, 60), Image.Resampling.LANCZOS), np.float32)
    found = np.asarray(Image.open(io.BytesIO(data)), np.float32)
    assert np.abs(found - expected).mean() < 3


def test_exif_rotation_is_applied_when_the_image_is_written_anew() -> None:
    image = Image.new("RGB", (80, 40), "red")
    image.paste("blue", (0, 0, 40, 40))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise, to show it upright
    data, _ = prepare(encode(image, "JPEG", exif=exif, quality=95), 20, 95)
    reduced = Image.open(io.BytesIO(data))
    assert reduced.size == (20, 40)
    assert 0x0112 not in reduced.getexif()
    top, bottom = np.asarray(reduced)[5].mean(0), np.asarray(reduced)[35].mean(0)
    assert top[2] > 200 > 50 > top[0]  # blue is at the top now
    assert bottom[0] > 200 > 50 > bottom[2]


@pytest.mark.parametrize("short_side", [None, 32])
@pytest.mark.parametrize("style", ["JPEG", "PNG", "WEBP"])
def test_damage(style: str, short_side: int | None) -> None:
    data = encode(photo(200, 150), style)
    for damaged in (data[: len(data) // 2], data[:20], b"", b"a text"):
        with pytest.raises(OSError, match=r"."):
            prepare(damaged, short_side, 90)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1),
    st.sampled_from([None, 16]),
)
def test_any_damage_is_an_oserror_or_none(
    style: str, flips: list[tuple[float, int]], short_side: int | None
) -> None:
    damaged = bytearray(encode(photo(40, 30), style))
    for place, flip in flips:
        damaged[int(place * len(damaged))] ^= flip
    with contextlib.suppress(OSError):
        data, extension = prepare(bytes(damaged), short_side, 90)
        assert data
        assert extension in ("jpg", "png", "webp", "bmp", "ppm", "tif", "gif")
        # What is let into a shard can be read in training.
        for channels in (1, 3):
            assert decode(data, image_size=1000, channels=channels).shape[2] == channels


@pytest.mark.slow
def test_damage_is_found_at_an_eighth_of_the_size_as_at_full_size() -> None:
    rng = np.random.default_rng(7)
    whole = [
        encode(photo(200, 150, mode), "JPEG", quality=95, **options)
        for mode in ("RGB", "L")
        for options in (
            {},
            {"progressive": True},
            {"subsampling": 0},
            {"restart_marker_rows": 1},
        )
    ]
    verdicts = Counter[bool]()
    for i in range(2500):
        data = bytearray(whole[i % len(whole)])
        at, count = int(rng.integers(2, len(data))), int(rng.integers(1, 200))
        match i // len(whole) % 4:
            case 0:
                del data[at:]
            case 1:
                del data[at : at + count]
            case 2:
                data[at : at + count] = rng.bytes(min(count, len(data) - at))
            case 3:
                data[at] ^= 1 << int(rng.integers(8))
        found = []
        for check in (
            lambda image: prepare(image, None, 90),
            lambda image: decode(image, image_size=4000, channels=3),
        ):
            try:
                check(bytes(data))
                found.append(True)
            except (OSError, BadSample):
                found.append(False)
        assert found[0] == found[1], bytes(data).hex()
        verdicts[found[0]] += 1
    assert min(verdicts.values()) > 500


def test_formats_beyond_the_list_are_refused() -> None:
    with pytest.raises(OSError, match="not an image"):
        prepare(encode(photo(9, 9), "ICO"), None, 90)


LAB = Image.merge("LAB", [photo(40, 30, "L")] * 3)
DEEP = np.linspace(0, 65_535, 40 * 30).reshape(30, 40)


@pytest.mark.parametrize(
    ("image", "style"),
    [
        (LAB, "TIFF"),
        (Image.fromarray((DEEP / 65_535).astype(np.float32)), "TIFF"),
        (Image.fromarray(DEEP.astype(np.uint16)), "TIFF"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_reduced_and_not_they_decode_to_the_same(
    image: Image.Image, style: str, channels: int
) -> None:
    data = encode(image, style)
    assert prepare(data, None, 90) == (data, "tif")
    small, extension = prepare(data, 20, 95)
    assert extension == ("jpg" if image.mode == "LAB" else "png")
    found = decode(small, image_size=1000, channels=channels).astype(float)
    whole = Image.fromarray(decode(data, image_size=1000, channels=3))
    whole = whole.resize((27, 20), Image.Resampling.LANCZOS).convert(
        "L" if channels == 1 else "RGB"
    )
    assert (
        np.abs(found - np.asarray(whole, float).reshape(found.shape)).mean() < 12
    )  # JPEG halves colour


@pytest.mark.parametrize("short_side", [None, 8])
def test_values_without_a_certain_range_are_refused_with_it(short_side: int | None) -> None:
    twelve = (DEEP / 16).astype(np.uint16)
    for image, reason in (
        (Image.fromarray(twelve), "16-bit values from 0 to 4095, of which white would be 65535"),
        (Image.fromarray((DEEP / 257).astype(np.int32)), "32-bit integers from 0 to 255"),
        (Image.fromarray((DEEP / 257).astype(np.float32)), "float values from 0 to 255"),
    ):
        with pytest.raises(OSError, match=reason):
            prepare(encode(image, "TIFF"), short_side, 90)


def test_files_that_git_lfs_has_not_fetched() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12345\n"
    with pytest.raises(
        OSError, match="a Git LFS pointer, not the image itself; run `git lfs pull`"
    ):
        prepare(pointer, None, 90)
