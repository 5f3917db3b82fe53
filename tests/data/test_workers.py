"""Decoding processes and their memory: killed, signalled, used again."""

import gc
import io
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.configs.sampling import Uniform
from bigbatch.data.begun import byte_ranges
from bigbatch.data.loader import _source
from bigbatch.data.workers import WorkerPool
from tests.helpers.micro_batches import (
    DECODING,
    batches_of,
    by_place,
    image_bytes,
    workers_alive,
    write_shards,
)


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
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from bigbatch.data.index import open_index\n"
        "from tests.helpers.micro_batches import batches_of, workers_alive\n"
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


@pytest.mark.slow
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


def test_a_pool_gives_batches_back_in_the_order_of_submission(index):
    pool = WorkerPool(_source(index, DECODING), 3)
    try:
        sizes = [1, 30, 2, 25, 3, 9, 1]
        for count in sizes:
            pool.submit(byte_ranges(index, np.arange(count)))
        assert [len(pool.receive().frames) for _ in sizes] == sizes
    finally:
        pool.close()


def test_a_worker_on_a_busy_core_does_not_slow_the_others(index):
    pool = WorkerPool(_source(index, DECODING), 2)
    slow, fast = pool._workers
    try:
        os.kill(slow.process.pid, signal.SIGSTOP)
        for count in (1, 2):
            pool.submit(byte_ranges(index, np.arange(count)))
        for count in (3, 4):
            wait_until(lambda: fast.left_to_do() == 0)
            pool.submit(byte_ranges(index, np.arange(count)))
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
