"""Crops on the host: Pillow's pixels, and the same pictures as the device's warp makes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bigbatch.configs.augment import Affine, Augment, Crop
from bigbatch.data.augment.crop import crop_resize
from bigbatch.data.augment.memory import Memory
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import Decoding, MicroBatch
from bigbatch.data.index import build_index
from bigbatch.data.loader import eval_batches
from bigbatch.data.tar import write_end, write_member

SHAPES = [(40, 60), (90, 30), (16, 16), (50, 50), (300, 200)]


def batch_of(shapes, channels=3):
    """Smooth images of the given (height, width)."""
    images = []
    for number, (height, width) in enumerate(shapes):
        y, x = np.mgrid[0:height, 0:width] / max(height, width) * 6
        waves = [np.sin(x + number), np.cos(y), np.sin(x + y)][:channels]
        images.append((np.stack(waves, 2) * 100 + 128).astype(np.uint8))
    return MicroBatch(
        step=3,
        index=1,
        samples=np.arange(len(shapes)),
        labels=torch.zeros(len(shapes), dtype=torch.int64),
        pixels=torch.from_numpy(np.concatenate([i.ravel() for i in images])),
        sizes=torch.tensor(shapes, dtype=torch.int32),
        channels=channels,
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("out", [8, 32])
def test_boxes_are_resized_as_pillow_does(channels, out):
    batch = batch_of(SHAPES, channels)
    # Left, top, width and height; the last ones reach the edges of their images.
    boxes = np.array([[3, 5, 20, 30], [0, 0, 30, 90], [4, 4, 9, 9], [1, 2, 49, 48], [7, 0, 1, 300]])
    result = crop_resize(batch, boxes.astype(float), out)
    assert result.shape == (5, channels, out, out)
    for image, (left, top, width, height), found in zip(
        batch.images(), boxes.tolist(), result, strict=True
    ):
        part = image[top : top + height, left : left + width].numpy()
        picture = Image.fromarray(part if channels == 3 else part[..., 0])
        expected = np.asarray(picture.resize((out, out), Image.Resampling.BILINEAR))
        expected = torch.from_numpy(expected.copy()).view(out, out, channels).permute(2, 0, 1) / 255
        torch.testing.assert_close(found, expected, atol=1.5 / 255, rtol=0)


def test_fractional_boxes_are_widened_to_whole_pixels():
    batch = batch_of([(40, 60)])
    wide = crop_resize(batch, np.array([[3.0, 5.0, 21.0, 31.0]]), 16)
    assert torch.equal(crop_resize(batch, np.array([[3.2, 5.9, 20.1, 29.6]]), 16), wide)
    # What arithmetic leaves beyond an edge is no further pixel.
    edge = np.array([[0.0, 0.0, 60.0, 40.0 + 1e-9]])
    assert crop_resize(batch, edge, 16).shape == (1, 3, 16, 16)


def test_mirrored_images_are_those_of_a_flip():
    batch, boxes = batch_of([(40, 60), (30, 20)]), np.array([[3.0, 5, 20, 30], [0, 0, 20, 30]])
    plain = crop_resize(batch, boxes, 16)
    mirrored = crop_resize(batch, boxes, 16, np.array([True, False]))
    assert torch.equal(mirrored, torch.stack([plain[0].flip(2), plain[1]]))


def test_memory_is_used_again_only_when_its_last_view_is_gone():
    memory = Memory()
    kept = memory.empty(3, 4).fill_(1)
    part = kept[1]
    place = kept.data_ptr()
    del kept
    assert memory.empty(3, 4).data_ptr() != place
    other = memory.empty(3, 4).fill_(2)
    assert (part == 1).all()
    del part, other
    found = {memory.empty(2, 2).data_ptr() for _ in range(5)}
    assert len(found) == 1
    assert memory.empty(50, 50).fill_(3).sum() == 7500


def test_the_host_and_the_warp_show_the_same_crops():
    def images(**more):
        augment = Augment(crop=Crop(), flip=0.5, **more)
        device = torch.device("cpu")
        augmenter = Augmenter(
            augment, image_size=24, crop_fraction=1.0, classes=1, seed=0, device=device
        )
        return augmenter.images(batch_of([(40, 60), (90, 130), (48, 48), (300, 200)] * 5))

    # An affine map that changes nothing still takes the way of the warp.
    difference = (images() - images(affine=Affine())).abs()
    assert difference.mean() < 0.01
    assert difference.max() < 0.12
    unlike = (images() - images().flip(3)).abs()
    assert unlike.mean() > 0.05


def ramp(height, width):
    """An image whose red and green tell the place: x and y from 0 to 255."""
    y, x = np.mgrid[0.5:height, 0.5:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, 0 * x], 2)
    file = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file, "JPEG", quality=100, subsampling=0)
    return file.getvalue()


@pytest.mark.parametrize("affine", [None, Affine(degrees=10, scale=0.2)])
@pytest.mark.parametrize("crop", [None, Crop(scale=(0.1, 0.6))])
def test_a_reduced_image_shows_the_same_region(tmp_path, affine, crop):
    shapes = [(900, 700), (333, 555), (64, 90), (1201, 257), (450, 449), (800, 1500)]
    with (tmp_path / "000000.tar").open("wb") as file:
        for i, shape in enumerate(shapes):
            write_member(file, f"{i}.jpg", ramp(*shape))
            write_member(file, f"{i}.cls", b"0")
        write_end(file)
    index = build_index(tmp_path)
    device, augment = torch.device("cpu"), Augment(crop=crop, affine=affine, flip=0.5)
    augmenter = Augmenter(
        augment, image_size=32, crop_fraction=0.8, classes=1, seed=0, device=device
    )

    def batch(view, size):
        decoding = Decoding(size, channels=3, workers=0, threads=1, view=view)
        return next(eval_batches(index, decoding, batch=8, rank=0, world=1))

    small = batch(augmenter.view, 32)
    full = batch(None, 10**6)
    assert {1, 8} < set(small.frames["factor"].tolist())
    assert (full.frames["factor"] == 1).all()
    found, expected = augmenter.images(small), augmenter.images(full)
    # A shift by a pixel of the output is about a thirtieth of the crop.
    span = expected[:, :2].amax((2, 3)) - expected[:, :2].amin((2, 3))
    inside = slice(2, -2)
    difference = (found - expected)[:, :2, inside, inside].abs().amax((2, 3))
    assert (difference < span / 31 * 1.01 + 1.5 / 255).all()
    shift = (found - expected)[:, :2].mean((2, 3)).abs()
    assert (shift < span / 31 * 0.3 + 0.5 / 255).all()
