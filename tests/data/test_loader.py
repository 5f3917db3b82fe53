"""Micro-batches: the same whoever makes them, and whatever is damaged or killed."""

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.configs.sampling import Balanced, Uniform
from bigbatch.configs.schema import Affine, Crop
from bigbatch.data.decode import decode
from bigbatch.data.geometry import View
from bigbatch.data.index import build_index, open_index
from bigbatch.data.loader import (
    MicroBatch,
    _ahead,
    _extents,
    _source,
    eval_batches,
    train_batches,
)
from bigbatch.data.order import build_order
from bigbatch.data.shard import shard
from bigbatch.data.tar import write_end, write_member
from bigbatch.data.workers import WorkerPool

SIZE = 24
BALANCED = Balanced(name="balanced")
COUNTS = (9, 20, 12)  # of samples in each class


def image_bytes(number):
    """A small picture; no two have the same size and bytes, every third is a PNG."""
    height, width = 20 + number % 37, 30 + number * 7 % 41
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 3 % 256, y * 5 % 256, (x + y + number * 9) % 256], 2)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG" if number % 3 == 0 else "JPEG")
    return file.getvalue()


def write_shards(root, images, shard_samples=15):
    """(image bytes, label) pairs as shards with an index."""
    root.mkdir(parents=True)
    for start in range(0, len(images), shard_samples):
        with (root / f"{start:06d}.tar").open("wb") as file:
            for i, (data, label) in enumerate(images[start : start + shard_samples], start):
                write_member(file, f"{i:06d}.jpg", data)
                write_member(file, f"{i:06d}.cls", str(label).encode())
            write_end(file)
    return build_index(root)


def pictures():
    labels = np.repeat(range(len(COUNTS)), COUNTS).tolist()
    return [(image_bytes(i), label) for i, label in enumerate(labels)]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "train", pictures())


def batches_of(index, sampling=BALANCED, **changes):
    options = {
        "global_batch": 32,
        "micro_batch": 4,
        "rank": 0,
        "world": 1,
        "start_step": 0,
        "stop_step": 2,
        "image_size": SIZE,
        "channels": 3,
        "workers": 0,
        "threads": 1,
        "bad_samples": 0,
        "journal": None,
    }
    return train_batches(index, build_order(sampling, index, 5), **{**options, **changes})


def content(batch):
    """Everything in a batch, in a form that compares."""
    tensors = batch.labels, batch.sizes, batch.pixels
    return (batch.samples.tolist(), *(t.numpy().tobytes() for t in tensors), batch.channels)


def by_place(batches):
    return {(b.step, b.index): content(b) for b in batches}


def all_ranks(index, world, **changes):
    """The micro-batches of each of `world` ranks, put together."""
    together = {}
    for rank in range(world):
        places = []
        for batch in batches_of(index, rank=rank, world=world, **changes):
            places.append((batch.step, batch.index))
            together[places[-1]] = content(batch)
        assert places == [(s, m) for s in range(2) for m in range(rank, 8, world)]
    return together


@pytest.fixture(scope="module")
def reference(index):
    return by_place(batches_of(index))


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


@pytest.mark.slow
@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("workers", range(5))
def test_every_world_size_with_every_number_of_workers(index, reference, world, workers):
    assert all_ranks(index, world, workers=workers) == reference


def test_a_later_start_goes_on_in_the_same_stream(index, reference):
    later = by_place(batches_of(index, start_step=1))
    assert later == {place: b for place, b in reference.items() if place[0] == 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once(index, workers):
    options = {"image_size": SIZE, "channels": 1, "workers": workers, "threads": 1}
    for world in (1, 2, 4):
        seen = []
        for rank in range(world):
            batches = list(eval_batches(index, batch=12, rank=rank, world=world, **options))
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


def test_a_substitute_is_stored_as_its_place_asks(large, tmp_path):
    root = tmp_path / "train"
    shutil.copytree(large.root, root)
    broken = open_index(root)
    for sample in (2, 9, 10):
        path = root / broken.shards[broken.shard[sample]].name
        with path.open("r+b") as file:
            file.seek(int(broken.offset[sample]) + 50)
            file.write(b"damage")
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


# Bad samples.


@pytest.fixture
def damaged(tmp_path):
    """Shards in which samples 3, 4 and 30 no longer hold what was indexed."""
    index = write_shards(tmp_path / "train", pictures())
    for sample in (3, 4, 30):
        path = index.root / index.shards[index.shard[sample]].name
        with path.open("r+b") as file:
            file.seek(int(index.offset[sample]) + 50)
            file.write(b"damage")
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
    options = {"image_size": SIZE, "channels": 3, "workers": workers, "threads": 1}
    with pytest.raises(UserError, match=r"000000\.tar at byte .*CRC-32C.*substitutes nothing"):
        list(eval_batches(damaged, batch=8, rank=0, world=1, **options))


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


# Processes and their memory.


def workers_alive():
    return [
        p
        for p in psutil.Process().children()
        if p.status() != psutil.STATUS_ZOMBIE and "bigbatch.data.workers" in p.cmdline()
    ]


def test_a_killed_worker_is_one_clear_error(index):
    batches = batches_of(index, workers=2, stop_step=1000)
    next(batches)
    workers_alive()[0].kill()
    with pytest.raises(UserError, match="decoding worker was killed by SIGKILL"):
        list(batches)
    assert not workers_alive()


def test_workers_end_with_the_iterator(index):
    batches = batches_of(index, workers=3, stop_step=1000)
    next(batches)
    assert len(workers_alive()) == 3
    batches.close()
    assert not workers_alive()


def test_signals_to_the_whole_job_do_not_end_workers(index, reference):
    batches = batches_of(index, workers=2)
    found = [next(batches)]
    for process in workers_alive():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
    assert by_place([*found, *batches]) == reference


def test_workers_end_when_the_trainer_is_killed(index, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        "import sys, time, psutil\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_loader import batches_of, workers_alive, open_index\n"
        f"batches = batches_of(open_index({str(index.root)!r}), workers=2, stop_step=1000)\n"
        "next(batches)\n"
        "print(*[p.pid for p in workers_alive()], flush=True)\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pids = [int(p) for p in trainer.stdout.readline().split()]
    assert len(pids) == 2
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))


def test_batches_that_are_kept_are_not_overwritten(index, reference):
    kept = list(batches_of(index, workers=1))
    assert by_place(kept) == reference


def test_memory_is_used_again_only_when_its_last_view_is_gone(index):
    batches = batches_of(index, workers=1, stop_step=100)
    first = next(batches)
    views = [first.pixels[5:99], first.pixels.numpy()[7:80], first.canvas()]
    expected = [np.array(v) for v in views]
    del first
    for _ in islice(batches, 20):
        gc.collect()
    for view, value in zip(views, expected, strict=True):
        assert np.array_equal(view, value)
    batches.close()


def test_memory_does_not_grow_with_the_number_of_batches(index):
    def memory_files():
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        names = [os.readlink(link) for link in links if os.path.lexists(link)]
        return sum("bigbatch-slab" in name for name in names)

    before = memory_files()
    batches = batches_of(index, workers=2, stop_step=40)
    counts = Counter(memory_files() - before for _ in batches)
    assert max(counts) == counts.most_common(1)[0][0]  # most of the time as many as ever
    gc.collect()
    assert memory_files() == before


def test_a_batch_larger_than_its_memory_makes_it_grow(tmp_path):
    images = [(image_bytes(i), 0) for i in range(40)]
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    index = write_shards(tmp_path / "train", [*images, (file.getvalue(), 0)])
    options = {"image_size": 500, "micro_batch": 8, "global_batch": 16, "stop_step": 12}
    expected = by_place(batches_of(index, Uniform(), **options))
    assert by_place(batches_of(index, Uniform(), workers=1, **options)) == expected


def test_a_worker_that_fails_says_so(index, monkeypatch, capfd):
    # A decoder that cannot even be imported, as after a half-finished upgrade.
    monkeypatch.setenv("PYTHONPATH", str(index.root))
    (index.root / "simplejpeg.py").write_text("raise ImportError('half installed')")
    try:
        with pytest.raises(UserError, match=r"decoding worker failed .*status 1"):
            next(batches_of(index, workers=1))
    finally:
        (index.root / "simplejpeg.py").unlink()
    assert "half installed" in capfd.readouterr().err


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


def test_a_pool_gives_batches_back_in_the_order_of_submission(index):
    pool = WorkerPool(_source(index, SIZE, 3, 1), 3)
    try:
        sizes = [1, 30, 2, 25, 3, 9, 1]
        for count in sizes:
            pool.submit(_extents(index, np.arange(count)))
        assert [len(pool.receive().frames) for _ in sizes] == sizes
    finally:
        pool.close()


def test_a_worker_on_a_busy_core_does_not_slow_the_others(index):
    pool = WorkerPool(_source(index, SIZE, 3, 1), 2)
    slow, fast = pool._workers
    try:
        os.kill(slow.process.pid, signal.SIGSTOP)
        for count in (1, 2):
            pool.submit(_extents(index, np.arange(count)))
        for count in (3, 4):
            wait_until(lambda: fast.left_to_do() == 0)
            pool.submit(_extents(index, np.arange(count)))
        wait_until(lambda: fast.left_to_do() == 0)
        assert slow.left_to_do() == 1
        os.kill(slow.process.pid, signal.SIGCONT)
        assert [len(pool.receive().frames) for _ in range(4)] == [1, 2, 3, 4]
    finally:
        pool.close()


def wait_until(done):
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)
