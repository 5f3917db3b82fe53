"""Samples that are damaged or lost: what takes their place, and when a run stops."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.configs.sampling import Uniform
from bigbatch.data.decode import decode
from bigbatch.data.loader import eval_batches
from bigbatch.data.order import build_order
from tests.helpers.micro_batches import (
    BALANCED,
    DECODING,
    SIZE,
    all_ranks,
    batches_of,
    by_place,
    damage,
    image_bytes,
    pictures,
    write_shards,
)


@pytest.fixture
def damaged(tmp_path):
    """Shards in which samples 3, 4 and 30 no longer hold what was indexed."""
    index = write_shards(tmp_path / "train", pictures())
    damage(index, (3, 4, 30))
    return index


def test_a_bad_sample_is_substituted_and_nothing_else_moves(damaged, index, tmp_path):
    order = build_order(BALANCED, index, 5)
    intact = {(b.step, b.index): b for b in batches_of(index)}
    journal = tmp_path / "journal.jsonl"
    replaced = 0
    for batch in batches_of(damaged, bad_samples=100, journal=journal):
        original = intact[batch.step, batch.index]
        bad = np.isin(original.samples, (3, 4, 30))
        replaced += bad.sum()
        assert np.array_equal(batch.samples[~bad], original.samples[~bad])
        assert not np.isin(batch.samples, (3, 4, 30)).any()
        assert torch.equal(batch.labels, original.labels)  # of the same class
        for image, height_width, sample in zip(
            batch.canvas(), batch.sizes.tolist(), batch.samples, strict=True
        ):
            expected = decode(image_bytes(int(sample)), image_size=SIZE, channels=3)
            assert np.array_equal(image[: height_width[0], : height_width[1]], expected)
    assert replaced
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    assert {e["sample"] for e in entries} <= {3, 4, 30}
    for entry in entries:
        assert order.samples(np.array([entry["position"]]))[0] in (3, 4, 30)
        assert entry["step"] == entry["position"] // 32
        assert entry["offset"] == damaged.offset[entry["sample"]]
        assert entry["shard"] == damaged.shards[damaged.shard[entry["sample"]]].name
        assert "CRC-32C" in entry["reason"]


def test_substitutes_do_not_depend_on_world_and_workers(damaged):
    expected = by_place(batches_of(damaged, bad_samples=100))
    for world, workers in ((1, 2), (3, 0), (2, 1)):
        assert all_ranks(damaged, world, workers=workers, bad_samples=100) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(damaged, workers):
    found = sum(len(b.bad) for b in batches_of(damaged, bad_samples=100))
    assert len(list(batches_of(damaged, bad_samples=found, workers=workers))) == 16
    with pytest.raises(UserError, match=rf"^{found} samples .* allows {found - 1}"):
        list(batches_of(damaged, bad_samples=found - 1, workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_refuses_bad_samples(damaged, workers):
    decoding = replace(DECODING, workers=workers)
    with pytest.raises(UserError, match=r"000000\.tar at byte .*CRC-32C.*substitutes nothing"):
        list(eval_batches(damaged, decoding, batch=8, rank=0, world=1))


def test_what_is_no_image_is_found_and_what_is_odd_is_used(tmp_path):
    big = io.BytesIO()
    Image.new("RGB", (20_000, 30), "red").save(big, "PNG")
    dot = io.BytesIO()
    Image.new("L", (1, 1), 7).save(dot, "PNG")
    images = [(image_bytes(i), 0) for i in range(12)]
    images += [(b"", 0), (b"this is text", 0), (big.getvalue(), 0), (dot.getvalue(), 0)]
    index = write_shards(tmp_path / "train", images)
    reasons, used = {}, set()
    options = {"global_batch": 16, "micro_batch": 16, "stop_step": 1}
    for batch in batches_of(index, Uniform(), bad_samples=9, workers=1, **options):
        reasons |= {entry["sample"]: entry["reason"] for entry in batch.bad}
        used |= set(batch.samples.tolist())
        assert batch.canvas().shape[1] <= 8 * SIZE
    assert set(reasons) == {12, 13}
    assert reasons[12] == "0 bytes"
    assert "not an image" in reasons[13]
    assert used == set(range(16)) - {12, 13}


def test_a_class_without_one_good_sample_stops_the_run(tmp_path):
    index = write_shards(tmp_path / "train", [(b"text", 0)] * 30 + [(image_bytes(1), 1)] * 4)
    with pytest.raises(UserError, match="20 samples of one class in a row"):
        list(batches_of(index, bad_samples=1000))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_shard_is_named(tmp_path, workers):
    index = write_shards(tmp_path / "train", pictures())
    (index.root / "000015.tar").unlink()
    with pytest.raises(UserError, match=r"cannot read .*000015\.tar: No such file"):
        list(batches_of(index, workers=workers))
