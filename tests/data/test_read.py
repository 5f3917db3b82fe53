"""Reading byte ranges of shards."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from google_crc32c import value as crc32c

from bigbatch.configs.errors import UserError
from bigbatch.data import read
from bigbatch.data.read import BadSample, ShardReader
from bigbatch.data.readahead import reading_ahead
from tests.helpers.micro_batches import write_shards

PIECE = 1000


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve files of ten pieces each, and where the pieces lie."""
    folder, generator = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    paths, pieces = [], []
    for number in range(12):
        data = generator.bytes(10 * PIECE)
        paths.append(folder / f"{number:06d}.tar")
        paths[-1].write_bytes(data)
        for i in range(10):
            piece = data[i * PIECE : (i + 1) * PIECE]
            pieces.append((piece, (number, i * PIECE, PIECE, crc32c(piece))))
    return paths, pieces


def open_files(paths):
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.lexists(link)]
    return sum(Path(t) in paths for t in targets)


def test_reads_what_was_asked_for(shards):
    paths, pieces = shards
    reader = ShardReader(paths)
    assert all(reader.read(*place) == piece for piece, place in pieces)


def test_few_files_stay_open_and_no_thread_loses_its_own(shards, monkeypatch):
    monkeypatch.setattr(read, "_OPEN_FILES", 2)
    paths, pieces = shards
    places = np.random.default_rng(1).integers(0, len(pieces), 5000).tolist()

    def read_all():
        reader = ShardReader(paths)
        with ThreadPoolExecutor(8) as threads:
            right = threads.map(lambda i: reader.read(*pieces[i][1]) == pieces[i][0], places)
            assert all(right)
        assert open_files(paths) == 2

    read_all()
    assert open_files(paths) == 0


def test_wrong_bytes_are_bad_at_once(shards, monkeypatch):
    paths, pieces = shards
    monkeypatch.setattr(read.time, "sleep", pytest.fail)  # bad bytes are not tried again
    reader = ShardReader(paths)
    shard, offset, size, crc = pieces[3][1]
    with pytest.raises(BadSample, match="CRC-32C"):
        reader.read(shard, offset, size, crc ^ 1)
    with pytest.raises(BadSample, match="ends after 400 of 1,000 bytes"):
        reader.read(shard, 10 * PIECE - 400, size, crc)


def test_io_errors_are_tried_again_with_a_new_descriptor(shards, monkeypatch):
    paths, pieces = shards
    real, pauses, handles = os.pread, [], []

    def flaky(handle, size, offset):
        handles.append(os.fstat(handle).st_ino)
        if len(handles) <= 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(handle, size, offset)

    monkeypatch.setattr(read.os, "pread", flaky)
    monkeypatch.setattr(read.time, "sleep", pauses.append)
    assert ShardReader(paths).read(*pieces[0][1]) == pieces[0][0]
    assert pauses == [0.1, 0.2, 0.4]


def test_io_errors_that_stay_end_in_one_message(shards, monkeypatch):
    paths, pieces = shards
    monkeypatch.setattr(read.time, "sleep", lambda _: None)

    def broken(handle, size, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(read.os, "pread", broken)
    with pytest.raises(UserError, match=r"000002\.tar: Input/output error"):
        ShardReader(paths).read(*pieces[20][1])


def test_a_lost_shard_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.tar: No such file"):
        ShardReader([tmp_path / "gone.tar"]).read(0, 0, 1, 0)


def test_what_is_read_ahead_is_in_memory(tmp_path):
    """Against the system's own word on its page cache, which it is asked to empty first."""
    index = write_shards(tmp_path / "train", [(os.urandom(20_000), 0) for _ in range(64)])
    reader = ShardReader([index.root / file.name for file in index.shards])
    byte_ranges = list(
        zip(*(c.tolist() for c in (index.shard, index.offset, index.size)), strict=True)
    )

    def cold():
        return [not reader.in_memory(*byte_range[:2]) for byte_range in byte_ranges]

    for file in index.shards:
        with (index.root / file.name).open("rb") as shard:
            os.fsync(shard.fileno())
            os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not all(cold()[:32]):
        pytest.skip("this file system keeps its files in memory")
    with reading_ahead(index) as want:
        want(np.arange(32))
        deadline = time.monotonic() + 20
        while any(cold()[:32]) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert not any(cold()[:32])


def test_reading_ahead_leaves_errors_to_the_reader(tmp_path):
    index = write_shards(tmp_path / "train", [(b"x", 0)])
    (index.root / index.shards[0].name).unlink()
    with reading_ahead(index) as want:
        want(np.arange(1))
