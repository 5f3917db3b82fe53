"""Micro-batches: the same whoever makes them, and whatever is damaged or killed."""

import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bigbatch.configs.augment import Affine, Crop
from bigbatch.configs.errors import UserError
from bigbatch.configs.sampling import Uniform
from bigbatch.data.batch import Decoding, MicroBatch
from bigbatch.data.decode import decode
from bigbatch.data.geometry import View
from bigbatch.data.index import open_index
from bigbatch.data.loader import _ahead, eval_batches
from bigbatch.data.order import build_order
from bigbatch.data.writing.shard import shard
from tests.helpers.micro_batches import (
    BALANCED,
    COUNTS,
    SIZE,
    all_ranks,
    batches_of,
    by_place,
    content,
    damage,
    image_bytes,
    write_shards,
)


def test_a_batch_holds_the_decoded_samples_of_its_positions(index):
    order = build_order(BALANCED, index, 5)
    for batch in batches_of(index):
        start = batch.step * 32 + batch.index * 4
        assert batch.samples.tolist() == order.samples(np.arange(start, start + 4)).tolist()
        assert batch.labels.tolist() == index.label[batch.samples].tolist()
        canvas = batch.canvas()
        assert canvas.shape == (4, *batch.sizes.amax(0).tolist(), 3)
        for sample, image, (height, width) in zip(
            batch.samples, canvas, batch.sizes.tolist(), strict=True
        ):
            expected = decode(image_bytes(int(sample)), image_size=SIZE, channels=3)
            assert np.array_equal(image[:height, :width], expected)
            assert not image[height:].any()
            assert not image[:, width:].any()


@pytest.mark.parametrize(
    ("world", "workers", "threads"),
    [(1, 1, 1), (1, 4, 1), (2, 2, 3), (3, 1, 1), (5, 0, 2), (8, 0, 1)],
)
def test_batches_do_not_depend_on_world_workers_and_threads(
    index, reference, world, workers, threads
):
    assert all_ranks(index, world, workers=workers, threads=threads) == reference


# Not every pair, but every world size with two numbers of workers, every number with three sizes.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "workers"),
    [
        (world, workers)
        for world in range(1, 9)
        for workers in range(5)
        if world in (1, 3, 8) or workers in (0, 4)
    ],
)
def test_every_world_size_and_every_number_of_workers(index, reference, world, workers):
    assert all_ranks(index, world, workers=workers) == reference


def test_a_later_start_goes_on_in_the_same_stream(index, reference):
    later = by_place(batches_of(index, start_step=1))
    assert later == {place: b for place, b in reference.items() if place[0] == 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once(index, workers):
    decoding = Decoding(SIZE, channels=1, workers=workers, threads=1)
    for world in (1, 2, 4):
        seen = []
        for rank in range(world):
            batches = list(eval_batches(index, decoding, batch=12, rank=rank, world=world))
            assert [b.index for b in batches] == list(range(rank, 4, world))
            for b in batches:
                assert b.canvas().shape[3] == 1
                assert b.labels.tolist() == index.label[b.samples].tolist()
                seen += b.samples.tolist()
        assert sorted(seen) == list(range(sum(COUNTS)))


# Large images come at the resolution of what is seen of them.

SEEN = View(SIZE, 1.0, Crop(scale=(0.1, 1.0)), Affine(degrees=20, scale=0.3), 0.5, seed=7)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """JPEGs and PNGs of up to 30 times the training size, and one that is long."""
    images = []
    for i, (height, width) in enumerate([(50, 70), (300, 260), (700, 500), (90, 640)] * 6):
        y, x = np.mgrid[0:height, 0:width]
        pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], 2).astype(np.uint8)
        file = io.BytesIO()
        kind = "PNG" if i % 5 == 0 else "JPEG"
        Image.fromarray(pixels).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
        images.append((file.getvalue(), i % 3))
    return write_shards(tmp_path_factory.mktemp("large") / "train", images)


def framed(batches):
    return {(b.step, b.index): (content(b), b.frames.tobytes()) for b in batches}


def test_what_is_stored_depends_on_the_place_in_the_run_alone(large):
    options = {"view": SEEN, "bad_samples": 100}
    expected = framed(batches_of(large, **options))
    found = set()
    for batch in batches_of(large, **options):
        found |= set(batch.frames["factor"].tolist())
        cut = batch.frames["left"] + batch.frames["top"] > 0
        assert (batch.frames["height"] * batch.frames["factor"] <= 700 + 8).all()
        assert (cut <= (batch.frames["full_width"] > 8 * SIZE)).all()
    assert found == {1, 2, 4, 8}
    for world, workers, threads in ((1, 2, 1), (3, 1, 2), (2, 0, 1)):
        together = {}
        for rank in range(world):
            changes = {"rank": rank, "world": world, "workers": workers, "threads": threads}
            together |= framed(batches_of(large, **options, **changes))
        assert together == expected
    later = framed(batches_of(large, start_step=1, **options))
    assert later == {place: b for place, b in expected.items() if place[0] == 1}


def test_small_images_of_the_first_steps_are_stored_small(large):
    """Each step as if all were of its size, in this process and in others."""
    grows = replace(SEEN, growth=((0, 12), (1, SIZE)))
    sizes = {0: replace(SEEN, out=12), 1: SEEN}
    expected = {
        place: content
        for step, view in sizes.items()
        for place, content in framed(batches_of(large, view=view)).items()
        if place[0] == step
    }
    assert framed(batches_of(large, view=grows)) == expected
    assert framed(batches_of(large, view=grows, workers=1)) == expected
    later = framed(batches_of(large, view=grows, start_step=1))
    assert later == {place: b for place, b in expected.items() if place[0] == 1}
    assert expected[0, 0] != framed(batches_of(large, view=SEEN, stop_step=1))[0, 0]


def test_a_substitute_is_stored_as_its_place_asks(large, tmp_path):
    root = tmp_path / "train"
    shutil.copytree(large.root, root)
    broken = open_index(root)
    damage(broken, (2, 9, 10))
    intact = {(b.step, b.index): b for b in batches_of(large, view=SEEN)}
    substituted = 0
    for batch in batches_of(broken, view=SEEN, bad_samples=100, workers=1):
        other = np.flatnonzero(batch.samples != intact[batch.step, batch.index].samples)
        substituted += len(other)
        full = np.stack([batch.frames["full_height"], batch.frames["full_width"]], 1)
        asked = SEEN.frames(full, np.arange(4), 4, 8 * SIZE, batch.step, batch.index)
        assert np.array_equal(batch.frames, asked)
        assert batch.sizes.tolist() == [[h, w] for h, w, *_ in asked.tolist()]
    assert substituted


def test_real_photos_pass(photo_folder, tmp_path):
    shard(str(photo_folder), tmp_path / "photos", split="0.8,0.1,0.1", progress=False)
    index = open_index(tmp_path / "photos" / "train")
    found = list(batches_of(index, Uniform(), workers=1, stop_step=1))
    assert len(found) == 8
    assert all(b.canvas().float().std() > 1 for b in found)


# The thread that prepares the next batch.


def numbers(stop):
    empty = torch.zeros(0)
    for i in range(stop):
        yield MicroBatch(i, 0, np.zeros(0, np.int64), empty, empty, empty, 3)


def test_ahead_keeps_order_and_prepares_each_batch():
    changed = _ahead(numbers(5), lambda b: replace(b, index=b.step + 1), lambda: None)
    assert [(b.step, b.index) for b in changed] == [(i, i + 1) for i in range(5)]


def test_ahead_passes_errors_on_and_closes_its_source():
    closed = []

    def failing():
        try:
            yield from numbers(2)
            raise UserError("broken")
        finally:
            closed.append(True)

    batches = _ahead(failing(), lambda b: b, lambda: None)
    assert next(batches).step == 0
    assert next(batches).step == 1
    with pytest.raises(UserError, match="broken"):
        next(batches)
    again = _ahead(failing(), lambda b: b, lambda: None)
    next(again)
    again.close()
    assert len(closed) == 2
