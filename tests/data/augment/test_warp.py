"""The one warp with maps of a list: borders, perspective, and what a worker stores for it."""

import json

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image

from bigbatch.configs.augment import Augment
from bigbatch.data import maps
from bigbatch.data.augment.warp import shift_images, warp, warp_images
from bigbatch.data.geometry import View, box_matrices, to_theta
from bigbatch.data.maps import Map
from bigbatch.data.workers import _plain, _view
from tests.data.augment.test_pipeline import PLAIN, augmenter, batch_of

SIDE = 24


def images_of(batch):
    return batch.canvas().permute(0, 3, 1, 2).float() / 255


def turned(border, matrices, batch=None, fill=None):
    batch = batch_of([(SIDE, SIDE)] * len(matrices)) if batch is None else batch
    return images_of(batch), warp(batch, matrices, SIDE, torch.device("cpu"), border, fill)


@pytest.mark.parametrize(
    ("border", "mode"), [("edge", "edge"), ("reflect", "symmetric"), ("black", "constant")]
)
def test_a_window_of_a_padded_image_is_numpys(border, mode):
    """Shifts by whole pixels: the crop with padding of CIFAR recipes."""
    for x, y in ((4, -3), (-4, 4), (0, 2), (20, -21)):
        source, shown = turned(border, maps.translation(x, y), fill=torch.zeros(3))
        padded = np.pad(source[0].numpy(), ((0, 0), (22, 22), (22, 22)), mode)
        expected = padded[:, 22 + y : 22 + y + SIDE, 22 + x : 22 + x + SIDE]
        np.testing.assert_allclose(shown[0].numpy(), expected, atol=2e-5)


def test_beyond_a_smaller_image_of_a_canvas_the_border_begins():
    batch = batch_of([(SIDE, SIDE), (10, 14)])
    for border in ("edge", "reflect", "mean"):
        fill = torch.tensor([0.1, 0.2, 0.3])
        matrices = maps.translation(np.array([3.0, 5.0]), 2.0)
        shown = warp(batch, matrices, SIDE, torch.device("cpu"), border, fill)
        alone = warp(
            batch.part(np.array([1])), matrices[1:], SIDE, torch.device("cpu"), border, fill
        )
        torch.testing.assert_close(shown[1:], alone, atol=1e-5, rtol=0)
        beyond = shown[1, :, 8:, 9:]
        assert bool((beyond == fill[:, None, None]).all()) is (border == "mean")


def test_a_rotation_with_fill_is_pillows():
    matrix = maps.rotation(np.array([33.0]), SIDE)
    source, shown = turned("mean", matrix, fill=torch.tensor([0.5] * 3))
    image = Image.fromarray((source[0].permute(1, 2, 0) * 255).round().byte().numpy())
    theirs = image.rotate(33, Image.Resampling.BILINEAR, fillcolor=(127, 127, 127))
    difference = np.abs(shown[0].permute(1, 2, 0).numpy() * 255 - np.asarray(theirs))
    assert difference.max() < 1.1  # Pillow rounds; 127 is no 127.5


def test_a_perspective_is_pillows():
    matrix = maps.perspective(np.array([[3.0, 5, 1, 6, 4, 2, 7, 3]]).T, SIDE)
    source, shown = turned("black", matrix, fill=torch.zeros(3))
    image = Image.fromarray((source[0].permute(1, 2, 0) * 255).round().byte().numpy())
    theirs = image.transform(
        image.size, Image.Transform.PERSPECTIVE, tuple(matrix[0].ravel()[:8]), 2
    )
    difference = np.abs(shown[0].permute(1, 2, 0).numpy() * 255 - np.asarray(theirs))
    assert (difference > 1.1).mean() < 0.01  # a pixel of the rim may fall on either side


def test_a_policys_warp_is_torchvisions():
    images = torch.rand(4, 3, SIDE, SIDE)
    angles = np.array([10.0, -25, 90, 3])
    theta = torch.from_numpy(to_theta(maps.rotation(angles, SIDE), SIDE, (SIDE, SIDE)))
    fill = torch.tensor([0.2, 0.5, 0.7])
    found = warp_images(images.clone(), theta, fill[:, None, None])
    for image, angle, ours in zip(images, angles, found, strict=True):
        theirs = tv.rotate(image, float(angle), tv.InterpolationMode.BILINEAR, fill=fill.tolist())
        # Its rim is mixed with the fill twice over, by the squares of the shares.
        ones = torch.ones_like(image)
        inner = tv.rotate(ones, float(angle), tv.InterpolationMode.BILINEAR, fill=0.0) > 0.9999
        outer = tv.rotate(ones, float(angle), tv.InterpolationMode.BILINEAR, fill=0.0) == 0
        for part in (inner, outer):
            torch.testing.assert_close(ours[part], theirs[part], atol=3e-4, rtol=0)
        assert (inner | outer).float().mean() > 0.8


@pytest.mark.parametrize("pixels", [0.0, 3.0, -5.0, 2.25, -7.75, 30.0, -24.5])
@pytest.mark.parametrize("dim", [2, 3])
def test_shifting_without_a_grid_is_the_same(pixels, dim):
    images, fill = torch.rand(2, 3, SIDE, SIDE), torch.tensor([0.2, 0.5, 0.7])[:, None, None]
    matrix = maps.translation(*((pixels, 0) if dim == 3 else (0, pixels)))
    theta = torch.from_numpy(to_theta(matrix, SIDE, (SIDE, SIDE))).expand(2, -1, -1)
    expected = warp_images(images.clone(), theta, fill)
    found = shift_images(images, pixels, dim, fill)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


LIST = [
    {"name": "rotate", "degrees": 40},
    {"name": "perspective", "p": 1},
    {"name": "scale", "factor": [0.5, 1.5]},
    {"name": "translate", "x": 0.3, "y": 0.3},
]


@pytest.mark.parametrize("border", ["edge", "reflect", "black"])
def test_of_a_large_image_all_that_is_seen_is_stored(border):
    view = augmenter(Augment(ops=LIST, border=border, **PLAIN), out=16).view
    size, whole = np.array([[400, 300]]), np.array([300, 400])
    edges = np.linspace(0, 16, 9)
    points = np.stack(np.meshgrid(edges, edges)).reshape(2, -1)
    for step in range(20):
        frame = view.frames(size, np.array([0]), 1, 40, step, 0)[0]
        matrices = box_matrices(view.boxes(size, step, 0), 16) @ view.warps(1, step, 0)
        seen = maps.apply_maps(matrices, points)[0].T  # [K, 2 (x, y)]
        if border == "reflect":
            seen = whole - np.abs(seen % (2 * whole) - whole)
        seen = seen.clip(0, whole) / frame["factor"]
        first = np.array([frame["left"], frame["top"]])
        last = [frame["left"] + frame["width"], frame["top"] + frame["height"]]
        assert (seen >= first - 1e-6).all()
        assert (seen <= np.array(last) + 1e-6).all()


def test_a_worker_gets_the_maps_of_a_view():
    view = View(16, 1.0, maps=(Map("rotate", 1, 0.3, (15.0,)),), border="reflect", place=(0, 1))
    found = _view(json.loads(json.dumps(_plain(view))))
    assert (found.maps, found.border) == (view.maps, view.border)
    assert np.array_equal(found.warps(5, 2, 1), view.warps(5, 2, 1))
