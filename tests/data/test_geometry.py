"""Where output pixels come from, against explicit computation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.configs.augment import Affine, Crop
from bigbatch.data import geometry
from bigbatch.data.rng import key64, uniforms

sizes = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=20)


@given(sizes, st.floats(0.05, 1), st.floats(0.3, 1), st.integers(0, 99))
def test_random_boxes_lie_inside_the_image_and_keep_the_ratio(shapes, scale, ratio, step):
    shapes = np.array(shapes)
    crop = Crop(scale=(scale / 2, scale), ratio=(ratio, 1 / ratio))
    left, top, width, height = geometry.random_boxes(crop, shapes, 0, step, 0).T
    assert (left >= -1e-9).all()
    assert (top >= -1e-9).all()
    assert (left + width <= shapes[:, 1] + 1e-6).all()
    assert (top + height <= shapes[:, 0] + 1e-6).all()
    assert (width / height >= ratio - 1e-6).all()
    assert (width / height <= 1 / ratio + 1e-6).all()


def test_random_boxes_have_the_asked_areas():
    shapes = np.full((4000, 2), 100)
    boxes = geometry.random_boxes(Crop(scale=(0.2, 0.6)), shapes, 7)
    area = boxes[:, 2] * boxes[:, 3] / 100**2
    assert area.min() >= 0.2
    assert area.max() <= 0.6
    assert area.mean() == pytest.approx(0.4, abs=0.01)


def test_a_box_maps_the_corners_of_the_output_to_its_own_corners():
    matrix = geometry.box_matrices(np.array([[3.0, 5.0, 20.0, 10.0]]), 8)[0]
    assert matrix @ [0, 0, 1] == pytest.approx([3, 5, 1])
    assert matrix @ [8, 8, 1] == pytest.approx([23, 15, 1])


@given(sizes, st.floats(0.05, 1), st.integers(8, 300), st.integers(0, 99), st.booleans())
def test_images_are_reduced_as_far_as_no_output_pixel_has_to_share_a_source_pixel(
    shapes, scale, out, step, crops
):
    shapes = np.array(shapes)
    view = geometry.View(out, scale, Crop(scale=(scale / 2, scale)) if crops else None)
    count = len(shapes)
    frames = view.frames(shapes, np.arange(count), count, 10**6, step, 2)
    short = view.boxes(shapes, step, 2)[:, 2:].min(1)
    factor = frames["factor"]
    assert (short / factor >= out * (1 - 1e-5))[factor > 1].all()
    assert (short / factor < 2 * out)[factor < 8].all()
    # An image's frame does not depend on its company.
    alone = view.frames(shapes[-1:], np.array([count - 1]), count, 10**6, step, 2)
    assert alone[0] == frames[-1]


@given(sizes, st.integers(8, 60), st.integers(0, 99))
def test_what_is_cut_holds_all_that_is_seen(shapes, out, step):
    shapes = np.array(shapes)
    affine = Affine(degrees=40, translate=0.3, scale=0.4, shear=20)
    view = geometry.View(out, 1.0, Crop(scale=(0.1, 0.5)), affine, 0.5)
    count = len(shapes)
    frames = view.frames(shapes, np.arange(count), count, 0, step, 2)
    boxes = geometry.into_frames(view.boxes(shapes, step, 2), frames)
    maps = geometry.box_matrices(boxes, out) @ view.warps(count, step, 2)
    square = np.array([[0, out, 0, out], [0, 0, out, out], [1, 1, 1, 1]])
    corners = (maps @ square)[:, :2]
    for (height, width, full_height, full_width, factor, left, top), (x, y) in zip(
        frames.tolist(), corners, strict=True
    ):
        assert 0 <= left < left + width <= -(-full_width // factor)
        assert 0 <= top < top + height <= -(-full_height // factor)
        # Interpolation reaches half a pixel further, but never beyond the image's own edge.
        assert left == 0 or left + width == -(-full_width // factor) or x.min() >= 1
        assert left + width == -(-full_width // factor) or x.max() <= width - 1
        assert top + height == -(-full_height // factor) or y.max() <= height - 1


def test_flip_mirrors_about_the_centre_line():
    matrix = geometry.affine_matrices(None, 1.0, 1, 10, 0)[0]
    assert matrix @ [0, 4, 1] == pytest.approx([10, 4, 1])


def test_affine_stays_within_its_limits_and_fixes_the_centre_without_translation():
    affine = Affine(degrees=30, scale=0.2)
    matrices = geometry.affine_matrices(affine, 0.0, 500, 16, 3)
    assert matrices @ [8, 8, 1] == pytest.approx(np.tile([8, 8, 1.0], (500, 1)))
    zoom = 1 / np.sqrt(np.linalg.det(matrices[:, :2, :2]))
    angle = np.rad2deg(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert (zoom >= 0.8 - 1e-9).all()
    assert (zoom <= 1.2 + 1e-9).all()
    assert np.abs(angle).max() <= 30
    assert np.abs(angle).max() > 28  # and uses the range


def test_identity_gives_torchs_identity_theta():
    theta = geometry.to_theta(np.eye(3)[None], 12, (12, 12))
    assert theta[0] == pytest.approx(np.array([[1, 0, 0], [0, 1, 0]]))


def test_keys_tell_integers_from_strings_and_orders_apart():
    keys = {key64(1, 0), key64(0, 1), key64("1", 0), key64("1\x1fint:0"), key64(10), key64()}
    assert len(keys) == 6


PINNED = [0.7293327520674122, 0.7475975722785257, 0.9877740848788755]


def test_uniforms_are_pinned_for_ever():
    # Resume across versions of this package depends on these very numbers.
    assert uniforms((3,), 0, "a").tolist() == pytest.approx(PINNED, abs=0)


def test_uniforms_look_uniform():
    numbers = uniforms((200, 500), 5)
    counts = np.histogram(numbers, 20, (0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 44  # chi-square, 19 degrees, p = 0.001
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.01
