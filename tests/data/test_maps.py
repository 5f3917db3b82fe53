"""Maps of geometric operations, against Pillow, torchvision and brute force."""

import numpy as np
import pytest
import torchvision.transforms.v2.functional as tv
from PIL import Image

from bigbatch.data import maps
from bigbatch.data.geometry import View
from bigbatch.data.maps import Map, apply_maps, draw_maps, jacobians

OUT, KEY = 32, (7, 3, 1)
MAPS = {
    "rotate": (30.0,),
    "shear": (20.0, 10.0),
    "translate": (0.2, 0.1),
    "scale": (0.5, 2.0),
    "perspective": (0.6,),
    "vertical_flip": (),
    "pad_crop": (4,),
}


def drawn(name, count=50, p=1.0, occurrence=0, key=KEY):
    return draw_maps(Map(name, occurrence, p, MAPS[name]), count, OUT, *key)


def pillow(matrix):
    """The coefficients of Pillow's transform, whose pixel centres lie at + 0.5 as ours do."""
    return tuple(matrix[:2].ravel())


@pytest.mark.parametrize("name", MAPS)
def test_draws_follow_from_key_name_and_occurrence(name):
    assert np.array_equal(drawn(name), drawn(name))
    some = drawn(name, p=0.5)
    assert not np.array_equal(some, drawn(name, p=0.5, key=(7, 3, 2)))
    assert not np.array_equal(some, drawn(name, p=0.5, occurrence=1))
    left = (some == np.eye(3)).all((1, 2))
    assert 5 < left.sum() < 45
    assert np.array_equal(some[~left], drawn(name)[~left])  # p changes nothing else


def test_a_view_takes_no_draws_from_another():
    one = tuple(Map(name, 0, 0.7, values) for name, values in MAPS.items())
    warps = View(OUT, 1.0, seed=7, maps=one).warps(9, 3, 1)
    product = np.eye(3)
    for each in one:
        product = product @ draw_maps(each, 9, OUT, *KEY)
    np.testing.assert_allclose(warps, product, atol=1e-12)


def test_values_stay_within_their_ranges():
    many = {name: drawn(name, 2000) for name in MAPS}
    angles = np.rad2deg(np.arctan2(many["rotate"][:, 1, 0], many["rotate"][:, 0, 0]))
    assert (np.abs(angles) <= 30).all()
    assert angles.min() < -28
    assert angles.max() > 28
    assert np.abs(many["shear"][:, 0, 1]).max() == pytest.approx(np.tan(np.deg2rad(20)), rel=0.02)
    assert np.abs(many["shear"][:, 1, 0]).max() == pytest.approx(np.tan(np.deg2rad(10)), rel=0.02)
    assert np.abs(many["translate"][:, 0, 2]).max() == pytest.approx(6.4, rel=0.02)
    assert np.abs(many["translate"][:, 1, 2]).max() == pytest.approx(3.2, rel=0.02)
    zoom = 1 / many["scale"][:, 0, 0]
    assert zoom.min() == pytest.approx(0.5, rel=0.02)
    assert np.median(zoom) == pytest.approx(1, abs=0.05)  # as often smaller as larger
    shifts = many["pad_crop"][:, :2, 2]
    assert np.unique(shifts).tolist() == list(range(-4, 5))


def test_a_rotation_is_pillows():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (OUT, OUT), np.uint8))
    ours = image.transform(
        image.size, Image.Transform.AFFINE, pillow(maps.rotation(np.array([25.0]), OUT)[0]), 2
    )
    assert np.array_equal(np.asarray(ours), np.asarray(image.rotate(25, 2)))


def test_a_perspective_puts_corners_where_torchvisions_does():
    inwards = np.random.default_rng(0).uniform(0, 8, (8, 3))
    found = maps.perspective(inwards, OUT)
    corners = np.array([[0, 0], [OUT, 0], [OUT, OUT], [0, OUT]], float)
    for matrix, moved in zip(found, inwards.T, strict=True):
        shown = corners + np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * moved.reshape(4, 2)
        np.testing.assert_allclose(apply_maps(matrix[None], shown.T)[0].T, corners, atol=1e-9)
        start, end = corners.tolist(), shown.tolist()
        theirs = tv._geometry._get_perspective_coeffs(start, end)
        np.testing.assert_allclose(matrix.ravel()[:8], theirs, atol=1e-4)  # solved in float32


def test_derivatives_are_those_of_differences():
    matrices = drawn("perspective", 4)
    points = np.array([[3.0, 16.0, 30.0], [5.0, 16.0, 12.0]])
    slopes = jacobians(matrices, points)
    for axis in range(2):
        step = np.zeros((2, 1))
        step[axis] = 1e-5
        forward, back = apply_maps(matrices, points + step), apply_maps(matrices, points - step)
        difference = np.moveaxis((forward - back) / 2e-5, 1, 2)  # [B, K, 2]
        np.testing.assert_allclose(slopes[..., axis], difference, rtol=1e-5, atol=1e-6)
    affine = drawn("rotate", 3)
    assert np.array_equal(jacobians(affine, points), np.repeat(affine[:, None, :2, :2], 3, 1))
