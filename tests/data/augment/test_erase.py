"""Erasing and cutout, between the other operations and mixing."""

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing

from bigbatch.configs import augment_ops as c
from bigbatch.configs.augment import Augment
from bigbatch.data.augment.erase import cutout_rectangles, erase, erasing_rectangles
from bigbatch.data.augment.operation import Draws
from tests.data.augment.test_pipeline import PLAIN, augmenter, batch_of

DRAWS = Draws(3, 1, 4, "erasing")
MEAN, STD = [0.3, 0.5, 0.6], [0.2, 0.1, 0.3]


def test_rectangles_have_area_ratio_and_place_as_asked():
    config = c.Erasing(name="erasing", area=(0.05, 0.2), ratio=(0.5, 3.0), count=2)
    found = erasing_rectangles(config, DRAWS, 3000, 100)
    assert found.shape == (3000, 2, 4)
    left, top, right, bottom = np.moveaxis(found, -1, 0)
    assert found.min() >= 0
    assert found.max() <= 100
    area, ratio = (right - left) * (bottom - top) / 1e4, (bottom - top) / (right - left)
    assert area.min() == pytest.approx(0.025, rel=0.1)  # two share it
    assert area.max() == pytest.approx(0.1, rel=0.1)
    assert ratio.min() == pytest.approx(0.5, rel=0.1)
    assert ratio.max() == pytest.approx(3, rel=0.1)
    assert np.median(ratio) == pytest.approx(np.sqrt(1.5), rel=0.05)
    centres = (left + right) / 2
    assert centres.mean() == pytest.approx(50, abs=1.5)


def test_areas_are_as_large_as_timms():
    config = c.Erasing(name="erasing")
    found = erasing_rectangles(config, DRAWS, 4000, 32)
    ours = (found[..., 2] - found[..., 0]) * (found[..., 3] - found[..., 1])
    theirs = RandomErasing(probability=1, mode="const", device="cpu")
    white = torch.ones(1, 32, 32)
    areas = [(theirs(white.clone()) == 0).sum().item() for _ in range(1500)]
    assert np.mean(ours) == pytest.approx(np.mean(areas), rel=0.06)


def test_a_square_is_cut_off_at_the_edges():
    found = cutout_rectangles(c.Cutout(name="cutout", size=9), DRAWS, 4000, 20)[:, 0]
    left, right = found[:, 0], found[:, 2]
    sizes, counts = np.unique(right - left, return_counts=True)
    assert sizes.tolist() == list(range(5, 10))
    assert counts[-1] / 4000 == pytest.approx(12 / 20, abs=0.03)
    inside = np.zeros((20, 20))
    for x, y, x2, y2 in found:
        inside[y:y2, x:x2] += 1
    assert inside[10, 10] / 4000 == pytest.approx(81 / 400, abs=0.02)
    assert inside[0, 0] / 4000 == pytest.approx(25 / 400, abs=0.02)  # corners less often


def test_erasing_by_slices_is_erasing_by_mask():
    images, rectangles = torch.rand(5, 3, 12, 10), torch.tensor([[[1, 2, 5, 12], [4, 0, 9, 3]]] * 5)
    rectangles[2] = 0
    fill = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    for inside in (fill, torch.rand(5, 3, 12, 10)):
        found = erase(images.clone(), rectangles, inside)
        masked = images.clone()
        for i in range(5):
            for x, y, x2, y2 in rectangles[i].tolist():
                of_fill = inside if inside.ndim == 3 else inside[i, :, y:y2, x:x2]
                masked[i, :, y:y2, x:x2] = of_fill
        assert torch.equal(found, masked)
        device = erase(images.to("meta"), rectangles.to("meta"), inside.to("meta"))
        assert device.shape == images.shape


@pytest.mark.parametrize(("fill", "mean", "std"), [("mean", 0, 0), ("noise", 0, 1)])
def test_what_is_filled_in_is_told_after_normalisation(fill, mean, std):
    """Trap 8: 0, or normal numbers, are what the network sees, as of timm's erasing."""
    config = c.Erasing(name="erasing", p=1, area=(0.5, 0.5), ratio=(1, 1), fill=fill)
    batch = batch_of([(64, 64)] * 8)
    images, _ = augmenter(Augment(ops=[config], mean=MEAN, std=STD), out=64).train(batch)
    plain, _ = augmenter(Augment(mean=MEAN, std=STD), out=64).train(batch)
    inside = (images - plain).abs() > 1e-5
    share = (images != plain).float().mean((1, 2, 3))
    assert share == pytest.approx(np.full(8, 0.5), abs=0.02)
    for channel in range(3):
        values = images[:, channel][inside[:, channel]]
        assert values.mean() == pytest.approx(mean, abs=0.04)
        assert values.std() == pytest.approx(std, abs=0.03)


def test_black_is_black():
    images = augmenter(Augment(ops=[c.Cutout(name="cutout", size=8, fill="black")], **PLAIN))
    found = images.images(batch_of([(16, 16)] * 4))
    assert ((found == 0).all(1).sum((1, 2)) >= 16).all()


def test_erased_images_are_mixed_not_mixed_ones_erased():
    """Trap 4: the order is that of timm and of torchvision's references."""
    config = c.Cutout(name="cutout", size=8, fill="black")
    mixed = Augment(ops=[config], mixup=1.0, **PLAIN)
    batch = batch_of([(16, 16)] * 4)
    images, _ = augmenter(mixed).train(batch)
    erased = (augmenter(mixed).images(batch) == 0).all(1)
    alone = erased & ~erased[[1, 2, 3, 0]]
    assert (images.sum(1)[alone] > 0).float().mean() > 0.2  # a partner's pixels show through
