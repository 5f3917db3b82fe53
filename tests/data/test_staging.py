"""The cache of remote files: whole copies only, whoever is killed and whatever fails."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.data import retry, staging
from bigbatch.data.staging import ABOUT, Cache, _checksums
from tests.helpers.servers import Store

MB = 1 << 20


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry, "_LONGEST_PAUSE_S", 0.05)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(staging, "PIECE", 64 << 10)


def noise(size, seed=0):
    return random.Random(f"{size} {seed}").randbytes(size)


def content(cache, url):
    handle = cache.open(url)
    try:
        return os.pread(handle, os.fstat(handle).st_size, 0)
    finally:
        os.close(handle)


def files_of(folder, count, size=100_000):
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03d}.tar").write_bytes(noise(size, i))
    return [f"file://{folder}/{i:03d}.tar" for i in range(count)]


def copies(cache):
    """The names of the files that the cache holds."""
    found = (cache.folder / "files").glob("*/*")
    return sorted(path.name for path in found if path.name != ABOUT)


def check_whole(cache):
    """Every copy is what its record says."""
    for folder in (cache.folder / "files").iterdir():
        (path,) = (p for p in folder.iterdir() if p.name != ABOUT)
        about = json.loads((folder / ABOUT).read_bytes())
        with path.open("rb") as file:
            assert _checksums(file.fileno()) == about["crc32c"]


def test_a_file_is_copied_once(tmp_path):
    data = noise(1_000_000)
    with Store({"a.tar": data}) as store:
        cache = Cache(tmp_path, 10 * MB)
        assert content(cache, f"{store.url}/a.tar") == data
        assert content(cache, f"{store.url}/a.tar") == data
        assert content(Cache(tmp_path, 10 * MB), f"{store.url}/a.tar") == data
        assert store.sent == len(data)
    assert list((tmp_path / "partial").iterdir()) == []
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_changed_file_is_another_file(tmp_path):
    (url,) = files_of(tmp_path / "source", 1)
    assert content(Cache(tmp_path / "cache", MB), url) == noise(100_000, 0)
    (tmp_path / "source" / "000.tar").write_bytes(noise(100_000, 5))
    os.utime(tmp_path / "source" / "000.tar", (1, 1))
    assert content(Cache(tmp_path / "cache", MB), url) == noise(100_000, 5)


@pytest.mark.parametrize("options", [{"ranges": False}, {"lengths": False}])
@pytest.mark.parametrize("size", [0, 1, 64 << 10, 700_001])
def test_servers_without_ranges_or_lengths(tmp_path, options, size):
    with Store({"x": noise(size)}, **options) as store:
        assert content(Cache(tmp_path, MB), f"{store.url}/x") == noise(size)


@pytest.mark.parametrize("size", [0, 1, (64 << 10) - 1, 64 << 10, (64 << 10) + 1, 500_000])
def test_sizes_around_a_piece(tmp_path, size):
    with Store({"x": noise(size)}) as store:
        assert content(Cache(tmp_path, MB), f"{store.url}/x") == noise(size)


def test_files_of_unknown_size_keep_to_the_limit_too(tmp_path):
    files = {f"{i}.tar": noise(100_000, i) for i in range(4)}
    with Store(files, lengths=False) as store:
        cache = Cache(tmp_path, 250_000)
        for name, data in files.items():
            assert content(cache, f"{store.url}/{name}") == data
            time.sleep(0.01)
            assert len(copies(cache)) <= 2
    assert copies(cache) == ["2.tar", "3.tar"]


def test_the_least_recently_used_copy_leaves_and_none_in_use(tmp_path):
    urls = files_of(tmp_path / "source", 6)
    cache = Cache(tmp_path / "cache", 300_000)
    for url in urls[:3]:
        content(cache, url)
        time.sleep(0.01)
    content(cache, urls[0])
    content(cache, urls[3])
    assert copies(cache) == ["000.tar", "002.tar", "003.tar"]
    held = cache.open(urls[2])
    time.sleep(0.01)
    content(cache, urls[0])
    content(cache, urls[3])
    content(cache, urls[4])  # 002 is the oldest but for being open
    content(cache, urls[5])
    content(cache, urls[1])
    assert "002.tar" in copies(cache)
    assert len(copies(cache)) == 3
    assert os.pread(held, 10, 0) == noise(100_000, 2)[:10]
    os.close(held)


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_PATIENCE_S", 0.3)
    urls = files_of(tmp_path / "source", 3)
    with pytest.raises(UserError, match=r"no room .* raise data.cache_gb"):
        Cache(tmp_path / "small", 99_999).open(urls[0])
    cache = Cache(tmp_path / "cache", 250_000)
    held = [cache.open(url) for url in urls[:2]]
    with pytest.raises(UserError, match="no room"):
        cache.open(urls[2])
    os.close(held[0])
    os.close(cache.open(urls[2]))
    assert copies(cache) == ["001.tar", "002.tar"]
    os.close(held[1])


def test_waits_for_room(tmp_path):
    urls = files_of(tmp_path / "source", 2)
    cache = Cache(tmp_path / "cache", 150_000)
    held = cache.open(urls[0])
    threading.Timer(0.5, os.close, [held]).start()
    assert content(cache, urls[1]) == noise(100_000, 1)


def test_a_damaged_copy_is_told_from_a_damaged_source(tmp_path):
    (url,) = files_of(tmp_path / "source", 1)
    cache = Cache(tmp_path / "cache", MB)
    content(cache, url)
    assert not cache.drop_damaged(url)
    (path,) = (tmp_path / "cache" / "files").glob("*/000.tar")
    data = bytearray(path.read_bytes())
    data[70_000] ^= 1
    path.write_bytes(data)
    assert cache.drop_damaged(url)
    assert content(cache, url) == noise(100_000, 0)
    path.write_bytes(b"cut short")
    assert content(cache, url) == noise(100_000, 0)


def test_what_a_killed_process_was_removing_is_in_nobody_s_way(tmp_path):
    (url,) = files_of(tmp_path / "source", 1)
    cache = Cache(tmp_path / "cache", MB)
    content(cache, url)
    (path,) = (tmp_path / "cache" / "files").glob("*/000.tar")
    # Of the same process id, as containers give it at every start.
    left_over = tmp_path / "cache" / "partial" / f"{path.parent.name}.gone-{os.getpid()}"
    left_over.mkdir()
    (left_over / "000.tar").write_bytes(b"half")
    path.write_bytes(b"cut short")
    assert content(cache, url) == noise(100_000, 0)
    assert not left_over.exists()


def test_passing_failures_are_retried(tmp_path):
    data = noise(300_000)
    with Store({"x": data}) as store:
        bad = {*range(4), *range(6, 12)}  # of the version, and then of pieces
        store.fail = lambda number, path: (503, 429, 500)[number % 3] if number in bad else None
        assert content(Cache(tmp_path, MB), f"{store.url}/x") == data
        assert len(store.requests) > 15


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "does not exist; check data.path"), (403, "give this machine credentials")],
)
def test_final_failures_are_not_retried(tmp_path, status, message):
    with Store({"x": b"data"}) as store:
        store.fail = lambda number, path: status
        with pytest.raises(UserError, match=message):
            Cache(tmp_path, MB).open(f"{store.url}/x")
        assert len(store.requests) <= 2  # fsspec asks by HEAD, then by GET


def test_a_store_that_stays_away(tmp_path):
    with Store({"x": b"data"}) as store:
        store.fail = lambda number, path: 503
        with pytest.raises(UserError, match="in 8 attempts"):
            Cache(tmp_path, MB).open(f"{store.url}/x")
    with pytest.raises(UserError, match="in 8 attempts"):  # nobody listens any more
        Cache(tmp_path, MB).open(f"{store.url}/x")


def test_names_that_lead_nowhere(tmp_path):
    cache = Cache(tmp_path / "cache", MB)
    with pytest.raises(UserError, match="does not exist"):
        cache.open(f"file://{tmp_path}/none.tar")
    with pytest.raises(UserError, match="nonsense"):
        cache.open("nonsense://x/y")
    with pytest.raises(UserError, match="is a folder"):
        cache.open(f"file://{tmp_path}")
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"set data\.cache to a folder"):
        Cache(tmp_path / "taken", MB)


def test_defects_are_not_retried():
    calls = []

    def defect():
        calls.append(1)
        raise TypeError("ours")

    with pytest.raises(TypeError):
        retry.retry("x", defect)
    assert calls == [1]


def test_replaced_while_it_is_copied(tmp_path):
    files = {"x": noise(300_000, 1)}
    with Store(files) as store:

        def replace(number, path):
            if number == 3:
                files["x"] = noise(300_000, 2)

        store.fail = replace
        assert content(Cache(tmp_path, MB), f"{store.url}/x") == noise(300_000, 2)


CHILD = """
import sys
from bigbatch.data import staging
staging.PIECE = 64 << 10
cache = staging.Cache(sys.argv[1], int(sys.argv[2]))
import os
for url in sys.argv[3:]:
    os.close(cache.open(url))
    print(url, flush=True)
"""


def child(cache, limit, urls):
    command = [sys.executable, "-c", CHILD, str(cache), str(limit), *urls]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_several_processes_one_downloads(tmp_path):
    files = {f"{i}": noise(400_000, i) for i in range(4)}
    with Store(files) as store:
        urls = [f"{store.url}/{name}" for name in files]
        children = [child(tmp_path, 10 * MB, urls[i:] + urls[:i]) for i in range(3)]
        assert [c.wait(60) for c in children] == [0, 0, 0]
        assert store.sent == sum(map(len, files.values()))


def test_threads_and_evictions_together(tmp_path):
    urls = files_of(tmp_path / "source", 8, size=50_000)
    cache = Cache(tmp_path / "cache", 4 * 50_000)

    def use(number):
        chosen = random.Random(number)
        for _ in range(30):
            i = chosen.randrange(8)
            assert content(cache, urls[i]) == noise(50_000, i)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(use, range(3)))
    assert len(copies(cache)) <= 4
    check_whole(cache)


def killed_at_random(tmp_path, times):
    urls = files_of(tmp_path / "source", 40, size=300_000)
    cache = Cache(tmp_path / "cache", 25 * 300_000)
    chosen = random.Random(times)
    for _ in range(times):
        process = child(cache.folder, cache.limit, chosen.sample(urls, len(urls)))
        for _ in range(chosen.randrange(15)):
            process.stdout.readline()
        time.sleep(chosen.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        check_whole(cache)
    for i, url in enumerate(urls):
        assert content(cache, url) == noise(300_000, i)
    assert len(copies(cache)) == 25
    assert list((cache.folder / "partial").iterdir()) == []


def test_killed_at_random_moments(tmp_path):
    killed_at_random(tmp_path, 4)


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path):
    killed_at_random(tmp_path, 50)
