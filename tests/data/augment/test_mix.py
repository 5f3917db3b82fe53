"""Mixup, CutMix and their mixture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bigbatch.configs.augment import Augment
from bigbatch.data.augment.mix import _inside, cutmix, draw_cutmix, draw_mixup, mixture, mixup
from bigbatch.data.augment.operation import Draws
from tests.data.augment.test_pipeline import PLAIN, augmenter, batch_of

DRAWS = Draws(5, 2, 3, "mixup")
CUT = replace(DRAWS, name="cutmix")
COUNT, SIDE = 12, 16
LABELS = torch.arange(COUNT)


def plain(count=COUNT):
    """Images that are their number all over, so that each pixel says where it is from."""
    images = torch.arange(count).float()[:, None, None, None].expand(-1, 3, SIDE, SIDE).clone()
    return images, F.one_hot(torch.arange(count), count).float()


def test_a_label_of_cutmix_is_the_share_of_its_pixels():
    """Trap 4: of the box as it was cut off at the edge."""
    images, targets = plain()
    found, soft = cutmix(images.clone(), targets, CUT, 1.0)
    for image, target in zip(found, soft, strict=True):
        shares = torch.bincount(image[0].flatten().long(), minlength=COUNT) / SIDE**2
        torch.testing.assert_close(shares, target)
    assert (soft.max(1).values < 1).sum() > COUNT / 2


def test_boxes_have_area_one_minus_lambda_and_are_cut_off():
    _, boxes = draw_cutmix(CUT, 5000, 1.0, 100)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    lambdas = CUT.generator().beta(1.0, 1.0, 5000)
    side = np.floor(100 * np.sqrt(1 - lambdas)).astype(int) // 2 * 2
    inside = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < 100).all(1)
    assert (width[inside] == side[inside]).all()
    assert (height[inside] == side[inside]).all()
    assert (width <= side).all()
    assert 0.1 < inside.mean() < 0.5


def test_an_image_meets_itself_as_often_as_chance_has_it():
    """Trap 5: no shift by one, which pairs equal classes of a sorted batch; and each partner
    serves once."""
    for draw in (
        lambda d: draw_mixup(d, COUNT, 0.5)[0],
        lambda d: draw_cutmix(d, COUNT, 0.5, SIDE)[0],
    ):
        pairs = np.stack([draw(replace(DRAWS, step=step)) for step in range(3000)])
        assert (np.sort(pairs, 1) == np.arange(COUNT)).all()
        counts = (pairs[:, :, None] == np.arange(COUNT)).mean(0)  # [image, partner]
        assert counts == pytest.approx(np.full((COUNT, COUNT), 1 / COUNT), abs=0.03)
        assert np.diag(counts).mean() == pytest.approx(1 / COUNT, abs=0.01)


def test_a_mixture_gives_each_image_one_of_both_with_the_draws_of_each():
    images, targets = plain(64)
    config = Augment(mixup=0.5, cutmix=1.0, mix_switch=0.3)
    draws = replace(DRAWS, name="mixture")
    found, soft = mixture(images.clone(), targets, draws, config)
    up, up_targets = mixup(images.clone(), targets, replace(draws, name="mixup"), 0.5)
    cut, cut_targets = cutmix(images.clone(), targets, replace(draws, name="cutmix"), 1.0)
    is_cut = draws.uniforms(64) < 0.3
    assert 8 < is_cut.sum() < 32
    for i, cuts in enumerate(is_cut):
        assert torch.equal(found[i], cut[i] if cuts else up[i])
        assert torch.equal(soft[i], cut_targets[i] if cuts else up_targets[i])


def test_a_switch_at_its_ends_is_one_of_them():
    images, targets = plain()
    draws = replace(DRAWS, name="mixture")
    for switch, other in ((0.0, mixup), (1.0, cutmix)):
        config = Augment(mixup=0.5, cutmix=0.5, mix_switch=switch)
        found = mixture(images.clone(), targets, draws, config)
        expected = other(images.clone(), targets, replace(draws, name=other.__name__), 0.5)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_cutting_by_mask_is_cutting_by_slices():
    """The device's way, here on the CPU."""
    images, _ = plain()
    partner, boxes = draw_cutmix(CUT, COUNT, 1.0, SIDE)
    inside = _inside(boxes, images)
    masked = (1 - inside) * images + inside * images[torch.from_numpy(partner)]
    found, _ = cutmix(images, F.one_hot(LABELS, COUNT).float(), CUT, 1.0)
    assert torch.equal(found, masked)


def test_one_of_both_draws_as_it_does_beside_the_other():
    batch = batch_of([(16, 16)] * 8)
    up = augmenter(Augment(mixup=0.4, **PLAIN)).train(batch)[1]
    cut = augmenter(Augment(cutmix=0.4, **PLAIN)).train(batch)[1]
    both = augmenter(Augment(mixup=0.4, cutmix=0.4, **PLAIN)).train(batch)[1]
    same = torch.stack([(both == one).all(1) for one in (up, cut)])
    assert same.any(0).all()
    assert same.any(1).all()
