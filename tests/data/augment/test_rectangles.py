"""Rectangular inputs: what has a width and a height of its own, against libraries and formulas."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from timm.data.random_erasing import RandomErasing

from bigbatch.configs import augment_ops as c
from bigbatch.configs.augment import Affine, Augment, Crop
from bigbatch.data import geometry, maps
from bigbatch.data.augment import magnitudes
from bigbatch.data.augment.crop import crop_resize
from bigbatch.data.augment.erase import cutout_rectangles, erasing_rectangles
from bigbatch.data.augment.mix import cutmix, draw_cutmix
from bigbatch.data.augment.operation import Draws
from bigbatch.data.augment.policies import Steps, apply_steps
from bigbatch.data.augment.warp import warp
from tests.data.augment.test_crop import batch_of
from tests.data.augment.test_pipeline import augmenter

CPU = torch.device("cpu")
HEIGHT, WIDTH = OUT = 16, 48
DRAWS = Draws(3, 1, 4, "erasing")


def smooth(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    return batch_of([(height, width)]).canvas().permute(0, 3, 1, 2)


def pillow(images: torch.Tensor) -> Image.Image:
    return Image.fromarray(images[0].permute(1, 2, 0).numpy())


def test_a_centre_crop_has_the_shape_of_the_input() -> None:
    sizes = np.array([[32, 48], [32, 320], [100, 300]])
    boxes = geometry.centre_boxes(sizes, 1.0, out=OUT)
    np.testing.assert_allclose(boxes, [[0, 8, 48, 16], [112, 0, 96, 32], [0, 0, 300, 100]])
    half = geometry.centre_boxes(sizes, 0.5, (0, 1), OUT)
    np.testing.assert_allclose(half, [[0, 24, 24, 8], [0, 16, 48, 16], [0, 50, 150, 50]])
    whole = geometry.View(OUT, 1.0, squash=True).boxes(sizes, 0, 0)
    np.testing.assert_allclose(whole, [[0, 0, w, h] for h, w in sizes])


def test_the_ratio_of_a_random_crop_is_that_to_the_input() -> None:
    shapes = np.full((4000, 2), 600)
    crop = Crop(scale=(0.02, 0.1), ratio=(0.5, 2.0))
    left, top, width, height = geometry.random_boxes(crop, shapes, 7, out=OUT).T
    ratio, area = width / height / 3, width * height / 600**2
    assert (ratio.min(), ratio.max()) == pytest.approx((0.5, 2.0), rel=0.01)
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.02)
    assert (area.min(), area.max()) == pytest.approx((0.02, 0.1), rel=0.01)
    assert ((left >= 0) & (top >= 0)).all()
    # Where none fits: the largest one with the nearest ratio.
    box = geometry.random_boxes(Crop(scale=(1, 1), ratio=(1, 1)), np.array([[90, 90]]), 7, out=OUT)
    np.testing.assert_allclose(box, [[0, 30, 90, 30]])


def test_a_crop_is_resized_as_pillow_does() -> None:
    batch = batch_of([(40, 90), (30, 300)])
    boxes = np.array([[3, 5, 60, 30], [0, 0, 300, 30]])
    for image, (x, y, w, h), found in zip(
        batch.images(), boxes.tolist(), crop_resize(batch, boxes.astype(float), OUT), strict=True
    ):
        part = Image.fromarray(image[y : y + h, x : x + w].numpy())
        theirs = np.asarray(part.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
        wanted = torch.from_numpy(theirs.copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(found, wanted, atol=1.5 / 255, rtol=0)


@pytest.mark.parametrize("squash", [False, True])
def test_the_host_and_the_warp_show_the_same(squash: bool) -> None:
    """Training's crops, and evaluation's; an affine map that changes nothing takes the warp."""
    batch = batch_of([(40, 120), (90, 130), (48, 48), (30, 200)] * 4)
    for augment in ({"crop": Crop(), "flip": 0.5}, {"flip": 0.5}):
        one = augmenter(Augment(**augment), OUT, squash=squash).images(batch)
        other = augmenter(Augment(**augment, affine=Affine()), OUT, squash=squash).images(batch)
        assert one.shape == (16, 3, *OUT)
        difference = (one - other).abs()
        assert difference.mean() < 0.02
        assert difference.max() < 0.2


def test_a_rotation_is_pillows_and_a_perspective_moves_corners() -> None:
    source = smooth()
    picture, black = pillow(source), torch.zeros(3)
    batch = batch_of([OUT])
    turned = warp(batch, maps.rotation(np.array([20.0]), OUT), OUT, CPU, "black", black)
    theirs = np.asarray(picture.rotate(20, Image.Resampling.BILINEAR))
    difference = np.abs(turned[0].permute(1, 2, 0).numpy() * 255 - theirs)
    assert (difference > 1.1).mean() < 0.02  # a pixel of the rim may fall on either side
    inwards = np.array([[3.0, 5, 1, 6, 4, 2, 7, 3]])
    shown = np.array([[0, WIDTH, WIDTH, 0], [0, 0, HEIGHT, HEIGHT]], float)
    towards = np.array([[1, -1, -1, 1], [1, 1, -1, -1]]) * inwards.reshape(4, 2).T
    found = maps.apply_maps(maps.perspective(inwards.T, OUT), shown + towards)
    np.testing.assert_allclose(found[0], shown, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "values", "index", "reach"),
    [
        ("translate", (0.2, 0.1), (0, 2), 0.2 * WIDTH),
        ("translate", (0.2, 0.1), (1, 2), 0.1 * HEIGHT),
        ("pad_crop", (4,), (0, 2), 4),
        ("pad_crop", (4,), (1, 2), 4),
    ],
)
def test_shifts_are_shares_of_their_own_side(name, values, index, reach) -> None:
    found = maps.draw_maps(maps.Map(name, 0, 1.0, values), 3000, OUT, 7)[(slice(None), *index)]
    assert np.abs(found).max() == pytest.approx(reach, rel=0.01)


def test_flips_and_scales_keep_the_centre() -> None:
    centre = np.array([[WIDTH / 2], [HEIGHT / 2]])
    for name, values in (("scale", (0.5, 2.0)), ("vertical_flip", ()), ("rotate", (90.0,))):
        matrices = maps.draw_maps(maps.Map(name, 0, 1.0, values), 50, OUT, 7)
        np.testing.assert_allclose(maps.apply_maps(matrices, centre)[..., 0], [centre[:, 0]] * 50)
    affine = geometry.affine_matrices(Affine(degrees=40, scale=0.3, shear=9), 0.5, 50, OUT, 7)
    np.testing.assert_allclose(maps.apply_maps(affine, centre)[..., 0], [centre[:, 0]] * 50)


@pytest.mark.parametrize(
    ("name", "value", "theirs"),
    [
        ("rotate", 27.0, {"angle": 27.0, "translate": [0, 0], "shear": [0.0, 0.0]}),
        ("translate_x", 5.0, {"angle": 0.0, "translate": [-5, 0], "shear": [0.0, 0.0]}),
        ("translate_y", 3.0, {"angle": 0.0, "translate": [0, -3], "shear": [0.0, 0.0]}),
    ],
)
def test_operations_of_policies_are_torchvisions(name, value, theirs) -> None:
    images = smooth().float() / 255
    steps = Steps((name,), np.zeros((1, 1), np.int64), np.full((1, 1), value))
    black = torch.zeros(3, 1, 1)
    found = apply_steps(images.clone(), steps, black)
    if name == "rotate":
        wanted = tv.rotate(images, 27.0, tv.InterpolationMode.BILINEAR)
    else:
        wanted = tv.affine(images, scale=1.0, interpolation=tv.InterpolationMode.BILINEAR, **theirs)
    inside = apply_steps(torch.ones_like(images), steps, black) > 0.999
    assert inside.float().mean() > 0.4
    assert (found - wanted).abs()[inside].max() < 1e-3


def test_policies_move_by_shares_of_their_own_side() -> None:
    share, sign, level = np.ones(1), np.ones(1), np.full(1, 10.0)
    for name, side in (("translate_x", WIDTH), ("translate_y", HEIGHT)):
        theirs = magnitudes.torchvision(name, share, sign, magnitudes.STANDARD, OUT)
        assert theirs == np.trunc(150 / 331 * side)
        assert magnitudes.timm(name, level, sign, True, OUT) == pytest.approx(0.45 * side)


def test_erased_areas_are_as_large_as_timms_and_lie_inside() -> None:
    found = erasing_rectangles(c.Erasing(name="erasing"), DRAWS, 4000, OUT)
    assert (found.min((0, 1)) >= 0).all()
    assert (found.max((0, 1)) <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()
    ours = (found[..., 2] - found[..., 0]) * (found[..., 3] - found[..., 1])
    theirs = RandomErasing(probability=1, mode="const", device="cpu")
    white = torch.ones(1, *OUT)
    areas = [(theirs(white.clone()) == 0).sum().item() for _ in range(1500)]
    assert np.mean(ours) == pytest.approx(np.mean(areas), rel=0.08)
    squares = cutout_rectangles(c.Cutout(name="cutout", size=6), DRAWS, 4000, OUT)[:, 0]
    assert squares.max(0).tolist() == [WIDTH - 4, HEIGHT - 4, WIDTH, HEIGHT]


def test_boxes_of_cutmix_have_the_images_shape_and_labels_its_share() -> None:
    draws = Draws(5, 2, 3, "cutmix")
    _, boxes = draw_cutmix(draws, 3000, 1.0, OUT)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    side = np.sqrt(1 - draws.generator().beta(1.0, 1.0, 3000))
    inside = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < [WIDTH, HEIGHT]).all(1)
    assert (width[inside] == np.floor(WIDTH * side).astype(int)[inside] // 2 * 2).all()
    assert (height[inside] == np.floor(HEIGHT * side).astype(int)[inside] // 2 * 2).all()
    images = torch.arange(9.0)[:, None, None, None].expand(-1, 3, *OUT).clone()
    mixed, targets = cutmix(images, torch.eye(9), draws, 1.0)
    for image, target in zip(mixed, targets, strict=True):
        shares = torch.bincount(image[0].flatten().long(), minlength=9) / (HEIGHT * WIDTH)
        torch.testing.assert_close(shares, target)


def test_every_operation_takes_rectangles() -> None:
    """And what is stored of large images holds all that is seen: of two steps with two sizes."""
    names = [
        *("rotate", "shear", "translate", "scale", "perspective", "vertical_flip", "pad_crop"),
        *("hsv", "grayscale", "pca", "blur", "sharpen", "noise", "solarize", "posterize"),
        *("equalize", "autocontrast", "invert", "randaugment", "trivialaugment", "augmix"),
    ]
    listed = [{"name": name} for name in [*names, "erasing", "cutout"]]
    listed.insert(0, {"name": "autoaugment", "policy": "svhn"})
    augment = Augment.model_validate({"ops": listed, "mixup": 0.2, "cutmix": 1.0, "crop": {}})
    made = augmenter(augment, OUT, growth=((0, (8, 24)), (3, OUT)))
    batch = batch_of([(40, 60), (90, 130)] * 4)
    images, _ = made.train(batch)  # of step 3
    assert images.shape == (8, 3, *OUT)
    assert bool(images.isfinite().all())
