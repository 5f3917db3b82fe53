"""Sharding and indexing by two commits, side by side: for `benchmarks/index.py --against REV`.

Each measurement is a fresh process of the one tree, then of the other, in turn, several times;
medians are quoted. CPU seconds leave out imports, waits for the disk and other load.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[1]
# What a process of either tree runs: CPU and wall seconds of one call, as JSON.
_TIMED = """
import json, re, shutil, sys, time
from pathlib import Path
what, source, dest = sys.argv[1:]
if what == "index":
    from bigbatch.data.index import build_index
    work = lambda: build_index(Path(source))
else:
    import importlib
    try:
        shard = importlib.import_module("bigbatch.data.writing.shard").shard
    except ImportError:  # before the rooms
        shard = importlib.import_module("bigbatch." "data.shard").shard
    work = lambda: shard(source, Path(dest), progress=False)
cpu, wall = time.process_time(), time.perf_counter()
work()
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
shutil.rmtree(dest, ignore_errors=True)
# Not ru_maxrss, which a process inherits from the one that started it.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({"cpu_s": cpu, "wall_s": wall, "peak_mib": peak}))
"""


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A worktree of this repository at `revision`, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="against-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False)


def photos(path: Path | None, count: int) -> list[bytes]:
    """`count` JPEGs: those of a tar over and over, or smooth noise of about 108 kB each."""
    if path is not None:
        with tarfile.open(path) as tar:
            files = [tar.extractfile(m) for m in tar if m.name.lower().endswith(("jpg", "jpeg"))]
            found = [file.read() for file in files if file is not None]
    else:
        rng, found = np.random.default_rng(0), []
        for _ in range(min(count, 100)):
            small = Image.fromarray(rng.integers(0, 256, (190, 250, 3), dtype=np.uint8))
            file = io.BytesIO()
            small.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            found.append(file.getvalue())
    return [found[i % len(found)] for i in range(count)]


def write_sources(folder: Path, images: list[bytes]) -> dict[str, Path]:
    """The same photos as class folders, as a tar, and as Parquet with row groups of 100."""
    sources = {"folder": folder / "photos", "tar": folder / "photos.tar"}
    with tarfile.open(sources["tar"], "w") as tar:
        for i, data in enumerate(images):
            file = sources["folder"] / f"c{i % 10}" / f"{i:06d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            for name, content in ((f"{i:06d}.jpg", data), (f"{i:06d}.cls", b"%d" % (i % 10))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    table = pa.table({"image": images, "label": [i % 10 for i in range(len(images))]})
    sources["parquet"] = folder / "photos.parquet"
    pq.write_table(table, sources["parquet"], row_group_size=100)
    return sources


def timed(tree: Path, what: str, source: Path, dest: Path) -> dict[str, float]:
    """CPU and wall seconds, and the peak of memory, of one call by the code in `tree`."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "typings"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", _TIMED, what, str(source), str(dest)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{what} {source} by {tree} ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def side_by_side(
    old: Path, tasks: dict[str, tuple[str, Path]], dest: Path, repeats: int
) -> dict[str, dict[str, Any]]:
    """For each (what, source): medians of both trees, and how many times as fast this one is."""
    figures: dict[str, dict[str, Any]] = {}
    for name, (what, source) in tasks.items():
        runs: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
        for number in range(repeats):
            trees = {"old": old, "new": ROOT}
            for which in sorted(trees, reverse=number % 2 == 0):  # each goes first in turn
                runs[which].append(timed(trees[which], what, source, dest))
        middle = {
            which: {key: round(statistics.median(run[key] for run in those), 3) for key in those[0]}
            for which, those in runs.items()
        }
        ratios = {
            key: round(middle["old"][key] / middle["new"][key], 3) for key in ("cpu_s", "wall_s")
        }
        figures[name] = {**middle, "times_as_fast": ratios}
        print(
            f"{name:28} CPU {middle['old']['cpu_s']:7.2f} -> {middle['new']['cpu_s']:7.2f} s "
            f"({ratios['cpu_s']:.2f}), wall {middle['old']['wall_s']:7.2f} -> "
            f"{middle['new']['wall_s']:7.2f} s ({ratios['wall_s']:.2f}), peak "
            f"{middle['old']['peak_mib']:5.0f} -> {middle['new']['peak_mib']:5.0f} MiB"
        )
    return figures
