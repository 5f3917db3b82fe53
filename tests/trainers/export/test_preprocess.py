"""The crop as matrices against evaluation's own, pixel by pixel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigbatch.configs.augment import Augment
from bigbatch.configs.size import Size
from bigbatch.data.augment.crop import nearly_whole
from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import MicroBatch
from bigbatch.data.geometry import centre_boxes
from bigbatch.trainers.export.preprocess import CentreCrop

# Of what `grid_sample` gives, whose places are float32 in [-1, 1]: at 260 pixels a place is known
# to 260 / 2 * 2^-24 pixels, and neighbours may be 0 and 1.
SAMPLED = 2e-5


def evaluated(pixels: Tensor, out: Size, fraction: float, squash: bool = False) -> Tensor:
    """What evaluation makes of uint8 [N, H, W, C], before mean and std."""
    count, height, width, channels = pixels.shape
    augmenter = Augmenter(
        Augment(mean=[0.0] * channels, std=[1.0] * channels),
        image_size=out,
        crop_fraction=fraction,
        squash=squash,
        classes=2,
        seed=0,
        device=torch.device("cpu"),
    )
    batch = MicroBatch(
        step=0,
        index=0,
        samples=np.arange(count),
        labels=torch.zeros(count, dtype=torch.int64),
        pixels=pixels.reshape(-1),
        sizes=torch.tensor([[height, width]] * count, dtype=torch.int32),
        channels=channels,
    )
    return augmenter.evaluate(batch)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """The hardest pixels: no two are alike."""
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(values)


@pytest.mark.parametrize(
    ("height", "width", "out", "fraction", "channels"),
    [
        (256, 256, 224, 0.875, 3),  # square, whole pixels
        (250, 333, 224, 1.0, 3),  # half a pixel to either side
        (333, 250, 224, 0.875, 3),
        (64, 64, 96, 1.0, 1),  # enlarged
        (32, 32, 32, 1.0, 3),  # as it is
        (500, 375, 160, 0.95, 3),
        (3000, 120, 64, 1.0, 1),
        (1, 1, 8, 1.0, 3),
    ],
)
def test_whole_crops_are_evaluations_to_the_last_bit(
    height: int, width: int, out: int, fraction: float, channels: int
) -> None:
    pixels = noise(2, height, width, channels)
    assert nearly_whole(centre_boxes(np.array([[height, width]]), fraction))
    found = CentreCrop(out, fraction)(pixels)
    assert torch.equal(found, evaluated(pixels, out, fraction))
    # They are steps of 1/255: rounded where evaluation rounds.
    assert torch.equal(found, (found * 255).round() / 255)


@pytest.mark.parametrize(
    ("height", "width", "out", "fraction", "finer"),
    [(28, 33, 32, 1.0, 1), (28, 28, 24, 0.9, 1), (37, 60, 8, 0.95, 4), (99, 70, 8, 0.83, 7)],
)
def test_small_crops_between_pixels_are_sampled_as_evaluation_does(
    height: int, width: int, out: int, fraction: float, finer: int
) -> None:
    shrink = min(height, width) * fraction / out
    assert (round(shrink) if shrink > 1.3 else 1) == finer
    assert not nearly_whole(centre_boxes(np.array([[height, width]]), fraction))
    pixels = noise(2, height, width, 3)
    found = CentreCrop(out, fraction)(pixels)
    torch.testing.assert_close(found, evaluated(pixels, out, fraction), rtol=0, atol=SAMPLED)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 260),
    width=st.integers(1, 260),
    out=st.tuples(st.integers(8, 64), st.integers(8, 64)),
    fraction=st.floats(0.1, 1),
    squash=st.booleans(),
)
def test_rectangles_of_any_size_and_fraction(
    height: int, width: int, out: tuple[int, int], fraction: float, squash: bool
) -> None:
    """With squash of the whole image: all of its pixels are whole."""
    fraction = 1.0 if squash else fraction
    pixels = noise(1, height, width, 1)
    found, expected = (
        CentreCrop(out, fraction, squash)(pixels),
        evaluated(pixels, out, fraction, squash),
    )
    assert found.shape == (1, 1, *out)
    difference = (found - expected).abs()
    boxes = centre_boxes(np.array([[height, width]]), fraction, out=None if squash else out)
    shrink = max(boxes[0, 3] / out[0], boxes[0, 2] / out[1])
    beside = int((difference > SAMPLED).sum())
    few = max(1, difference.numel() // 1000) if shrink > 8 else 1
    assert beside <= (few if nearly_whole(boxes) else 0)
    assert difference.max() <= 1.001 / 255


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 260),
    width=st.integers(1, 260),
    out=st.integers(8, 64),
    fraction=st.floats(0.1, 1),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_any_size_and_fraction(
    height: int, width: int, out: int, fraction: float, channels: int, seed: int
) -> None:
    pixels = noise(1, height, width, channels, seed=seed)
    found, expected = CentreCrop(out, fraction)(pixels), evaluated(pixels, out, fraction)
    difference = (found - expected).abs()
    whole = nearly_whole(centre_boxes(np.array([[height, width]]), fraction))
    # Where it shrinks more than eightfold, float32 cannot hold the kernel's integers: a value
    # just between two steps may go to the other one. Below that it is one in ten million.
    beside = int((difference > SAMPLED).sum())
    far = min(height, width) * fraction > 8 * out
    few = max(1, difference.numel() // 1000) if far else 1
    assert beside <= (few if whole else 0)
    assert difference.max() <= 1.001 / 255


def test_a_value_that_lies_between_two_steps() -> None:
    """The one in ten million that hypothesis has found."""
    pixels = noise(1, 224, 224, 3, seed=8)
    found, expected = CentreCrop(30, 0.7265625)(pixels), evaluated(pixels, 30, 0.7265625)
    difference = (found - expected).abs()
    assert int((difference > SAMPLED).sum()) <= 1
    assert difference.max() <= 1.001 / 255


def test_images_of_a_batch_do_not_meet() -> None:
    pixels = noise(5, 40, 57, 3)
    crop = CentreCrop(24, 0.9)
    alone = torch.cat([crop(image[None]) for image in pixels])
    torch.testing.assert_close(crop(pixels), alone, rtol=0, atol=1e-6)
