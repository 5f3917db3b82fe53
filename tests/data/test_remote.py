"""Reading from a URL gives what reading the same shards from the disk gives."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.sampling import Uniform
from bigbatch.data import retry
from bigbatch.data.batch import Decoding
from bigbatch.data.index import open_index
from bigbatch.data.lanes import LaneOrder
from bigbatch.data.loader import eval_batches
from bigbatch.data.order import build_order
from bigbatch.data.remote import open_remote, remote_at
from bigbatch.data.staging import ABOUT, Remote
from bigbatch.data.writing.shard import shard
from tests.helpers import micro_batches
from tests.helpers.servers import Store

GB = 10**9


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Shards of 60 digits each: 18 of them for training."""
    dest = tmp_path_factory.mktemp("shards") / "digits"
    shard("digits", dest, samples_per_shard=60)
    return dest


@pytest.fixture(scope="module")
def store(digits):
    paths = [path for path in digits.rglob("*") if path.is_file()]
    with Store({str(p.relative_to(digits)): p.read_bytes() for p in paths}) as store:
        yield store


@pytest.fixture
def remote(store, tmp_path):
    return Remote(f"{store.url}/train", str(tmp_path / "cache"), GB)


def order_of(index, lanes):
    if lanes:
        return LaneOrder(index, 7, lanes=lanes, window=2, micro_batch=16)
    return build_order(Uniform(), index, 7)


def batches_of(index, lanes, *, rank=0, world=1, workers=0, bad_samples=0):
    sizes = {"global_batch": 128, "micro_batch": 16, "image_size": 8, "channels": 1, "threads": 2}
    where = {"rank": rank, "world": world, "start_step": 3, "stop_step": 8, "workers": workers}
    order = order_of(index, lanes)
    batches = micro_batches.batches_of(
        index, order=order, bad_samples=bad_samples, **sizes, **where
    )
    for batch in batches:
        yield (batch.step, batch.index), (batch.samples.tolist(), batch.pixels.numpy().tobytes())


@pytest.mark.parametrize("lanes", [0, 8])
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 1), (4, 0)])
def test_the_same_batches_as_from_the_disk(digits, remote, lanes, world, workers):
    local = dict(batches_of(open_index(digits / "train"), lanes))
    together = {}
    for rank in range(world):
        index = open_remote(remote)
        together |= batches_of(index, lanes, rank=rank, world=world, workers=workers)
    assert together == local


def test_evaluation_reads_every_sample(digits, remote):
    decoding = Decoding(8, channels=1, workers=0, threads=1)
    index = open_remote(remote)
    batches = (eval_batches(index, decoding, batch=100, rank=rank, world=2) for rank in range(2))
    found = [b.samples for rank in batches for b in rank]
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(len(index)))


def test_an_index_is_copied_once(store, remote):
    first = open_remote(remote)
    sent = store.sent
    again = open_remote(remote)
    assert store.sent - sent < 10_000  # the manifest
    assert again.root == first.root
    assert first.keys() == again.keys()


def test_few_shards_are_in_a_small_cache(digits, remote):
    index = open_remote(remote)
    largest = max(s.bytes for s in index.shards)
    small = remote._replace(limit=9 * largest)
    index = open_remote(small)
    local = dict(batches_of(open_index(digits / "train"), 8))
    found = {}
    for rank in range(4):  # two lanes each, two windows of two shards
        found |= batches_of(index, 8, rank=rank, world=4)
        held = [p for p in Path(remote.cache).glob("files/*/*") if p.name != ABOUT]
        assert sum(p.stat().st_size for p in held) <= small.limit
    assert found == local


@pytest.mark.parametrize(("lanes", "message"), [(0, "data.lanes"), (8, "lower data.window")])
def test_a_cache_too_small_for_the_order(remote, lanes, message):
    index = open_remote(remote._replace(limit=300_000))
    with pytest.raises(UserError, match=f"raise data.cache_gb, or .*{message}"):
        next(batches_of(index, lanes))


def test_a_damaged_copy_is_fetched_again(digits, remote):
    index = open_remote(remote)
    first = dict(batches_of(index, 0))
    for path in Path(remote.cache).glob("files/*/*.tar"):
        data = bytearray(path.read_bytes())
        data[600:] = bytes(len(data) - 600)
        path.write_bytes(data)
    assert dict(batches_of(open_remote(remote), 0)) == first


def test_a_damaged_source_is_a_bad_sample(digits, tmp_path):
    source = tmp_path / "digits"
    shutil.copytree(digits, source)
    index = open_index(source / "train")
    with (source / "train" / "000002.tar").open("r+b") as file:
        for offset in index.offset[2 * 60 : 3 * 60].tolist():
            file.seek(offset)
            file.write(b"xxxx")
    index = open_remote(Remote(f"file://{source}/train", str(tmp_path / "cache"), GB))
    with pytest.raises(UserError, match=r"000002.tar at byte .* differ from the index"):
        list(batches_of(index, 0))
    assert len(list(batches_of(index, 0, bad_samples=60))) == 5 * 8


def test_what_cannot_be_opened(store, remote, tmp_path):
    def message(url):
        with pytest.raises(UserError) as raised:
            open_remote(remote._replace(url=url))
        return str(raised.value)

    assert "no index at" in message(f"{store.url}/nothing")
    files = store.files
    store.files = {**files, "train/index/label.npy": files["train/index/crc.npy"]}
    assert "is damaged, or was replaced" in message(f"{store.url}/train")
    store.files = {**files, "train/index/manifest.json": b"{}"}
    assert "is damaged, or was replaced" in message(f"{store.url}/train")
    store.files = {k: v for k, v in files.items() if k != "train/000000.tar"}
    assert "000000.tar does not exist" in message(f"{store.url}/train")
    store.files = {**files, "train/000000.tar": b"short"}
    assert "has 5 bytes; it had" in message(f"{store.url}/train")
    store.files = files
    assert len(open_remote(remote)) > 1000


def test_the_copying_process_ends_with_a_killed_trainer(store, remote):
    store.fail = lambda number, path: 503 if path.endswith(".tar") else None
    code = f"""
from bigbatch.data.index import open_index
from bigbatch.data.order import build_order
from bigbatch.data.remote import prefetching
from bigbatch.data.staging import Remote
from bigbatch.configs.sampling import Uniform
from pathlib import Path
import time
index = open_index(Path({str(open_root(store, remote))!r}), Remote(*{tuple(remote)!r}))
with prefetching(index, build_order(Uniform(), index, 0), range(8)):
    print("ready", flush=True)
    time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "ready\n"
    (fetcher,) = psutil.Process(trainer.pid).children()
    deadline = time.monotonic() + 30
    before = len(store.requests)
    while len(store.requests) < before + 4 and time.monotonic() < deadline:
        time.sleep(0.05)  # it is at work
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    psutil.wait_procs([fetcher], timeout=30)
    assert not fetcher.is_running() or fetcher.status() == psutil.STATUS_ZOMBIE
    store.fail = lambda number, path: None


def open_root(store, remote):
    """The copy of the index, made while the store still answers."""
    fail, store.fail = store.fail, lambda number, path: None
    root = open_remote(remote).root
    store.fail = fail
    return root


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf")])
def test_the_size_of_a_cache_is_a_number_above_0(size):
    with pytest.raises(UserError, match="size above 0"):
        remote_at("s3://photos/train", None, size)
