"""Crops and colour under autocast: those of float32, whatever the sizes and the precision."""

import numpy as np
import pytest
import torch

from bigbatch.configs.augment import Affine, Augment, Crop, Jitter
from bigbatch.data.augment import pipeline
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import MicroBatch

AUGMENT = Augment(
    crop=Crop(),
    affine=Affine(degrees=10, shear=5),
    flip=0.5,
    jitter=Jitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
    mixup=0.4,
)


@pytest.fixture
def device_path(monkeypatch):
    """The warp also where a CPU would cut from the image: what every GPU run does."""
    monkeypatch.setattr(pipeline, "nearly_whole", lambda boxes: False)


def batch_of(shapes):
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (h, w, 3), np.uint8) for h, w in shapes]
    return MicroBatch(
        step=2,
        index=1,
        samples=np.arange(len(shapes)),
        labels=torch.arange(len(shapes)) % 4,
        pixels=torch.from_numpy(np.concatenate([image.ravel() for image in images])),
        sizes=torch.tensor(shapes, dtype=torch.int32),
        channels=3,
    )


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shapes", "out"),
    [
        ([(333, 250), (97, 61)], 56),
        ([(50, 70), (41, 41), (77, 30)], 33),
        ([(19, 27)], 40),
        ([(64, 64)], 32),
    ],
)
def test_images_are_those_of_float32(dtype, shapes, out):
    device, batch = torch.device("cpu"), batch_of(shapes)
    augmenter = Augmenter(
        AUGMENT, image_size=out, crop_fraction=0.875, classes=4, seed=0, device=device
    )

    def results():
        return [augmenter.evaluate(batch), augmenter.images(batch), *augmenter.train(batch)]

    expected = results()
    with torch.autocast("cpu", dtype):
        found = results()
        # Autocast goes on for the model.
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
    for name, a, b in zip(("evaluate", "images", "train", "targets"), found, expected, strict=True):
        assert a.dtype == torch.float32, name
        assert torch.equal(a, b), name
