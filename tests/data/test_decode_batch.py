"""A micro-batch's images are decoded as each alone would be, small and large, again and again."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bigbatch.configs.augment import Affine, Crop
from bigbatch.data import decode_batch
from bigbatch.data.decode_batch import BYTE_RANGE, BatchDecoder, ByteRanges, Source
from bigbatch.data.geometry import View

SIZE = 16
VIEWS = {
    "all": None,
    "crop": View(SIZE, 1.0, Crop(scale=(0.1, 1.0)), Affine(degrees=20, scale=0.3), 0.5, seed=7),
}
SHAPES = [(8, 8), (40, 12), (64, 64), (300, 310), (33, 500), (16, 16)]
LARGE = {3}  # with three channels more than decode_batch._SMALL


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[bytes]]:
    """PNGs and JPEGs of many sizes, one after another in a file, and one that is no image."""
    folder, rng, images = tmp_path_factory.mktemp("files"), np.random.default_rng(3), []
    for kind in ("PNG", "JPEG"):
        for height, width in SHAPES:
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, kind)
            images.append(file.getvalue())
    images.insert(4, b"no image at all")
    (folder / "images").write_bytes(b"".join(images))
    return folder, images


def ranges(images: list[bytes]) -> ByteRanges:
    found = np.zeros(len(images), BYTE_RANGE)
    found["size"] = [len(image) for image in images]
    found["offset"] = np.cumsum(found["size"]) - found["size"]
    return found


def decoder(folder: Any, view: View | None, threads: int, remember: int = 1 << 20) -> BatchDecoder:
    options: Any = {"view": view, "loose": True, "remember": remember}
    return BatchDecoder(Source(folder, ["images"], SIZE, 3, threads, **options))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("view", VIEWS)
def test_each_image_is_what_it_is_alone(files: Any, view: str, threads: int) -> None:
    folder, images = files
    assert {i for i, (h, w) in enumerate(SHAPES) if h * w * 3 > decode_batch._SMALL} == LARGE
    own, places, key = decoder(folder, VIEWS[view], threads), ranges(images), (5, 2)
    for _ in range(2):  # the second time small ones are remembered
        found = own.decode(places, lambda n: np.empty(n, np.uint8), key)
        assert list(found.bad) == [4]
        assert not found.frames[4]["height"]
        at = 0
        for place, frame in enumerate(found.frames):
            if place in found.bad:
                continue
            pixels, alone = decoder(folder, VIEWS[view], 1).one(
                places[place].item(), place, len(images), key
            )
            assert frame == alone[0]
            assert np.array_equal(found.pixels[at : at + pixels.size], pixels.ravel())
            at += pixels.size
        assert at == len(found.pixels)


def test_few_pixels_wait_for_the_frames_of_their_batch(
    files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many images a batch has; the others get a frame each, which is the same."""
    folder, images = files
    places, made = ranges(images), list[int]()
    expected = decoder(folder, VIEWS["crop"], 1).decode(places, lambda n: np.empty(n, np.uint8))
    own = decoder(folder, VIEWS["crop"], 1)
    stored = own._stored
    monkeypatch.setattr(own, "_stored", lambda *given: made.append(given[1]) or stored(*given))
    monkeypatch.setattr(decode_batch, "_WAITING", len(images) * 3 * 16 * 16)
    found = own.decode(places, lambda n: np.empty(n, np.uint8))
    assert made == [1, 2, 3, 5]  # PNGs of more than 16 x 16 pixels
    assert np.array_equal(found.frames, expected.frames)
    assert np.array_equal(found.pixels, expected.pixels)


def test_small_ones_that_pillow_decodes_are_read_once(
    files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, images = files
    own, places, read = decoder(folder, VIEWS["crop"], 1), ranges(images), list[Any]()
    monkeypatch.setattr(own, "_read", lambda place: read.append(place) or images[_of(place)])

    def _of(place: Any) -> int:
        return places.tolist().index(place)

    for _ in range(2):
        own.decode(places, lambda n: np.empty(n, np.uint8))
    again = [_of(place) for place in read[len(images) :]]
    assert again == [3, 4, *range(7, 13)]  # the large one, what is none, and JPEGs


@pytest.mark.parametrize("room", [0, 3 * (8 * 8 + 40 * 12), 3 * (8 * 8 + 40 * 12) + 1])
def test_no_more_is_remembered_than_there_is_room_for(files: Any, room: int) -> None:
    folder, images = files
    own = decoder(folder, None, 1, room)
    for _ in range(2):
        own.decode(ranges(images), lambda n: np.empty(n, np.uint8))
    assert sum(image.nbytes for image in own._remembered.values()) == room - room % 2
