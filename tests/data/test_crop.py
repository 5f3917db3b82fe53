"""Crops on the host: Pillow's pixels, and the same pictures as the device's warp makes."""

import numpy as np
import pytest
import torch
from PIL import Image

from bigbatch.configs.schema import Affine, Augment, Crop
from bigbatch.data.augment import Augmenter
from bigbatch.data.crop import crop_resize
from bigbatch.data.loader import MicroBatch

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
