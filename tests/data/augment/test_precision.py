"""Crops and colour are those of float32, whatever the sizes, and whatever the model computes in."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bigbatch.configs.augment import Affine, Augment, Crop, Jitter
from bigbatch.data.augment import pipeline
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.augment.warp import sampling_grid
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
    monkeypatch.setattr(pipeline, "nearly_whole", lambda boxes: np.zeros(len(boxes), bool))


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


def results(shapes, out):
    batch = batch_of(shapes)
    augmenter = Augmenter(
        AUGMENT,
        image_size=out,
        crop_fraction=0.875,
        classes=4,
        seed=0,
        device=torch.device("cpu"),
    )
    images, targets = augmenter.train(batch)
    plain = {"evaluation": augmenter.evaluate(batch), "before mixup": augmenter.images(batch)}
    return {**plain, "training": images, "targets": targets}


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
    expected = results(shapes, out)
    with torch.autocast("cpu", dtype):
        found = results(shapes, out)
        # Autocast goes on for the model.
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.usefixtures("device_path")
def test_a_lower_precision_of_matrix_products_reaches_no_image():
    """torch's switch for TF32 on GPUs; on CPUs "medium" is bfloat16 where oneDNN has it."""
    shapes, before = [(333, 250), (97, 61)], torch.get_float32_matmul_precision()
    expected = results(shapes, 33)
    try:
        torch.set_float32_matmul_precision("medium")
        found = results(shapes, 33)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("out", [1, 2, 33, 224])
def test_the_sampling_grid_is_that_of_affine_grid(out):
    theta = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    expected = F.affine_grid(theta.double(), [5, 3, out, out], align_corners=False)
    found = sampling_grid(theta, out)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
