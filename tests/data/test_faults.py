"""Faults while training reads: each named with shard and byte, and no other position moves."""

import io
import os
import random
import struct
import time
import zlib
from collections import defaultdict

import numpy as np
import psutil
import pytest
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.configs.sampling import Uniform
from bigbatch.data import decode_batch, read
from bigbatch.data.decode import MAX_PIXELS
from bigbatch.data.lanes import LaneOrder
from bigbatch.data.order import build_order
from tests.helpers.micro_batches import (
    SIZE,
    batches_of,
    by_place,
    content,
    image_bytes,
    workers_alive,
    write_shards,
)


def png(width, height, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (width, height), 1).save(file, "PNG")
    return file.getvalue()


def png_claiming(width, height):
    """Few bytes that would become many: a decompression bomb."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


# What lies in the shard, and why it cannot be used; None: it can.
IMAGES = {
    "0 bytes": (b"", "0 bytes"),
    "text named .jpg": (b"this is text", "not an image"),
    "cut JPEG": (image_bytes(1)[:-40], "truncated"),
    "20,000 x 20,000 pixels": (png_claiming(20_000, 20_000), "pixels"),
    "just too many pixels": (png_claiming(MAX_PIXELS // 9_000 + 1, 9_000), "the limit is"),
    "20,000 x 30 pixels": (png(20_000, 30), None),
    "30 x 20,000 pixels": (png(30, 20_000), None),
    "one pixel": (png(1, 1, "L"), None),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_image(tmp_path, workers):
    good = [(image_bytes(i), 0) for i in range(20)]
    index = write_shards(tmp_path / "train", good + [(data, 0) for data, _ in IMAGES.values()])
    reasons = {20 + i: why for i, (_, why) in enumerate(IMAGES.values()) if why}
    options = {"global_batch": 14, "micro_batch": 7, "stop_step": 2}  # one epoch
    order = build_order(Uniform(), index, 5)
    found, used = {}, []
    for batch in batches_of(index, Uniform(), bad_samples=99, workers=workers, **options):
        start = batch.step * 14 + batch.index * 7
        asked = order.samples(np.arange(start, start + 7))
        bad = np.isin(asked, list(reasons))
        assert np.array_equal(batch.samples[~bad], asked[~bad])
        assert not np.isin(batch.samples, list(reasons)).any()
        assert batch.canvas().shape[1] <= 8 * SIZE
        used += batch.samples.tolist()
        for entry in batch.bad:
            assert entry["shard"] == index.shards[index.shard[entry["sample"]]].name
            assert entry["offset"] == index.offset[entry["sample"]]
            found[entry["sample"]] = entry["reason"]
    assert found.keys() == reasons.keys()
    for sample, why in reasons.items():
        assert why in found[sample]
    assert set(used) == set(range(28)) - set(reasons)


def test_encoded_bytes_have_a_limit(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    index = write_shards(tmp_path / "train", [(file.getvalue(), 0), *([(image_bytes(1), 0)] * 15)])
    monkeypatch.setattr(decode_batch, "MAX_BYTES", len(file.getvalue()) - 1)
    options = {"global_batch": 16, "micro_batch": 16, "stop_step": 1, "bad_samples": 9}
    (batch,) = batches_of(index, Uniform(), **options)
    assert {e["sample"] for e in batch.bad} == {0}
    assert "encoded bytes; the limit is" in batch.bad[0]["reason"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", ["cut", "other images"])
def test_a_shard_that_changes_during_the_run(tmp_path, workers, change):
    """Its samples are substituted while those of other shards stay where they were."""
    pictures = [(image_bytes(i), 0) for i in range(60)]
    index = write_shards(tmp_path / "train", pictures)
    options = {"global_batch": 20, "micro_batch": 5, "stop_step": 3}
    intact = by_place(batches_of(index, Uniform(), **options))
    changed = write_shards(tmp_path / "copy", pictures)
    path = changed.root / changed.shards[2].name
    if change == "cut":
        os.truncate(path, 512)
    else:
        path.write_bytes((changed.root / changed.shards[1].name).read_bytes())
    moved = 0
    for batch in batches_of(changed, Uniform(), bad_samples=999, workers=workers, **options):
        before = np.array(intact[batch.step, batch.index][0])
        gone = index.shard[before] == 2
        moved += gone.sum()
        assert np.array_equal(batch.samples[~gone], before[~gone])
        assert not (index.shard[batch.samples] == 2).any()
        assert {e["shard"] for e in batch.bad} <= {changed.shards[2].name}
    assert moved == 15
    with pytest.raises(UserError, match=r"000030\.tar"):
        list(batches_of(changed, Uniform(), workers=workers, **options))


def killed_workers(tmp_path, times):
    """SIGKILL one decoding worker of three at random moments of a run; go on after each."""
    pictures = [(image_bytes(i), 0) for i in range(60)]
    index = write_shards(tmp_path / "train", pictures)
    steps = 40
    whole = by_place(batches_of(index, stop_step=steps))
    chosen = random.Random(times)
    step, kills, said = 0, 0, []
    while kills < times:
        batches = batches_of(index, workers=3, start_step=step, stop_step=steps)
        after = chosen.randrange(60)
        try:
            for number, batch in enumerate(batches):
                assert content(batch) == whole[batch.step, batch.index]
                step = batch.step  # of which the last may be half done: it comes again
                if number == after:
                    time.sleep(chosen.random() * 0.01)
                    chosen.choice(workers_alive()).kill()
                    kills += 1
            step = 0  # what was in hand when it died was enough
        except UserError as error:
            said.append(str(error))
        finally:
            batches.close()
        assert not workers_alive()
    assert said
    for message in said:
        assert "decoding worker was killed by SIGKILL" in message
        assert "start the run again" in message


def test_workers_killed_at_random_moments(tmp_path):
    killed_workers(tmp_path, 3)


@pytest.mark.slow
def test_workers_killed_at_twenty_random_moments(tmp_path):
    killed_workers(tmp_path, 20)


# Which shards a rank opens, and how much memory a run takes.


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_with_lanes_a_shard_is_opened_by_at_most_two_ranks(tmp_path, monkeypatch, world):
    index = write_shards(tmp_path / "train", [(image_bytes(i), 0) for i in range(128)], 4)
    order = LaneOrder(index, 3, lanes=8, window=2, micro_batch=2)
    opened, rank = defaultdict(set), 0

    class Counted(read._File):
        def __init__(self, path, cache):
            opened[path].add(rank)
            super().__init__(path, cache)

    monkeypatch.setattr(read, "_File", Counted)
    seen = {}
    for rank in range(world):
        options = {"global_batch": 16, "micro_batch": 2, "stop_step": 8}  # one epoch
        batches = batches_of(index, order=order, rank=rank, world=world, **options)
        seen |= {(b.step, b.index): b.samples.tolist() for b in batches}
    assert sorted(s for batch in seen.values() for s in batch) == list(range(128))
    assert len(opened) == 32
    assert max(map(len, opened.values())) <= min(world, 2)


@pytest.mark.parametrize("epochs", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_memory_is_flat_over_epochs(tmp_path, epochs):
    """Private memory of the trainer and its workers, and what they share, after a first epoch."""
    pictures = [(image_bytes(i), i % 3) for i in range(600)]
    index = write_shards(tmp_path / "train", pictures, 100)
    options = {"global_batch": 100, "micro_batch": 20, "image_size": 96}
    per_epoch = len(index) // 20
    levels = []
    batches = batches_of(index, workers=2, threads=2, stop_step=6 * epochs, **options)
    for number, batch in enumerate(batches):
        assert batch.canvas().sum() > 0
        if number % per_epoch == per_epoch // 2:
            processes = [psutil.Process(), *workers_alive()]
            levels.append(sum(p.memory_full_info().uss for p in processes) / 2**20)
    assert len(levels) == epochs
    # A leak of every batch (20 images of 4 kB) would be 2 MB an epoch, of every pixel more.
    assert max(levels[1:]) - levels[1] < 1 + 0.2 * epochs
