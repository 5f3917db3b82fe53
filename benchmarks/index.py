"""Samples per second that one core indexes, and how long an index takes to open.

    python benchmarks/index.py [--quick] [--json FILE] [--folder DIR]
    python benchmarks/index.py --against REV [--photos TAR] [--only-shard] [--quick] ...

Archives of random bytes, of the sizes of small pictures, of photos reduced to a short side
of 256 pixels, and of full ImageNet photos, are written and then read from the page cache in
one process by

    scan_shard   bigbatch's pass over an archive: headers checked, images and labels paired, CRC-32C
    tarfile      the same columns by Python's tarfile, which checks less
    webdataset   the webdataset package, samples grouped and not decoded, which gives no index

each several times in turn; the best counts. Then build_index as a whole, in one process and
in one per core, and open_index. Figures of one process are samples per second of CPU time, so
that other load on the machine does not count, and neither do waits for the disk; those of all
cores and of open_index are of the clock. Full: 3.9 GB on disk, about three minutes. --quick:
0.3 GB.

--against REV compares this tree with another commit instead: build_index of the same archives,
and `shard` of photos (the JPEGs in TAR, or generated ones of 108 kB) from folders, a tar and
Parquet, the two in turn.
"""

import argparse
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from google_crc32c import value as crc32c
from machine import benchmark_parser, machine, write_figures

from bigbatch.data.index import build_index, open_index
from bigbatch.data.samples import scan_shard
from bigbatch.data.tar import write_end, write_member

CASES = {"300 B": (300, 500_000), "30 kB": (30_000, 40_000), "108 kB": (108_000, 15_000)}
SHARDS = 8
QUICK = 12  # how many times fewer samples


def write_shards(folder: Path, size: int, samples: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with (folder / f"{shard:06d}.tar").open("wb", buffering=1 << 20) as file:
            for i in range(shard, samples, SHARDS):
                write_member(file, f"{i:08d}.jpg", rng.bytes(size))
                write_member(file, f"{i:08d}.cls", str(i % 1000).encode())
            write_end(file)


def with_bigbatch(paths: list[Path]) -> int:
    return sum(len(scan_shard(path).keys) for path in paths)


def with_tarfile(paths: list[Path]) -> int:
    rows: dict[str, list[int]] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                if extension == "cls":
                    rows[key].append(int(file.read()))
                else:
                    rows[key] = [member.offset_data, member.size, crc32c(file.read())]
    return len(rows)


def with_webdataset(paths: list[Path]) -> int:
    import webdataset as wds  # imports torch, which worker processes should not wait for

    return sum(1 for _ in wds.WebDataset([str(p) for p in paths], shardshuffle=False))


READERS: dict[str, Callable[[list[Path]], int]] = {
    "scan_shard": with_bigbatch,
    "tarfile": with_tarfile,
    "webdataset": with_webdataset,
}


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    work()
    return clock() - started


def measure(folder: Path, samples: int, repeats: int) -> dict[str, float]:
    """Samples per second of each reader and of build_index; seconds of open_index."""
    paths = sorted(folder.glob("*.tar"))
    best = dict.fromkeys(READERS, float("inf"))

    def read_all(reader: Callable[[list[Path]], int]) -> None:
        assert reader(paths) == samples

    for _ in range(repeats):
        for name, reader in READERS.items():
            best[name] = min(best[name], seconds(partial(read_all, reader), time.process_time))
    cores = len(os.sched_getaffinity(0))
    one = min(seconds(lambda: build_index(folder), time.process_time) for _ in range(repeats))
    many = min(seconds(lambda: build_index(folder, workers=cores)) for _ in range(repeats))
    opened = min(seconds(lambda: open_index(folder)) for _ in range(5))
    figures = {f"{name}_per_s": round(samples / best[name]) for name in READERS}
    figures["build_index_per_s"] = round(samples / one)
    figures["build_index_all_cores_per_s"] = round(samples / many)
    return figures | {"samples": samples, "cores": cores, "open_index_s": round(opened, 4)}


def compare(options: argparse.Namespace) -> None:
    """Index and shard by this tree and by another commit, and print the ratios."""
    from against import checkout, photos, side_by_side, write_sources

    shrink = QUICK if options.quick else 1
    with (
        checkout(options.against) as old,
        tempfile.TemporaryDirectory(dir=options.folder) as temporary,
    ):
        folder = Path(temporary)
        tasks = {}
        for name, (size, full) in CASES.items() if not options.only_shard else ():
            archives = folder / f"{size}-bytes"
            write_shards(archives, size, full // shrink)
            tasks[f"index, {name}"] = ("index", archives)
        sources = write_sources(folder, photos(options.photos, 3000 // shrink))
        tasks |= {f"shard of photos, {name}": ("shard", path) for name, path in sources.items()}
        figures = side_by_side(old, tasks, folder / "out", 3 if options.quick else 5)
    where = machine("numpy", "pyarrow", "pillow", "simplejpeg", against=options.against)
    write_figures(options.json, machine=where, figures=figures)


def main() -> None:
    parser = benchmark_parser(__doc__, quick=f"{QUICK} times fewer samples")
    parser.add_argument("--folder", type=Path, help="where to write the archives")
    parser.add_argument("--against", metavar="REV", help="compare with this commit")
    parser.add_argument("--photos", type=Path, help="with --against: a tar of JPEGs")
    parser.add_argument("--only-shard", action="store_true", help="with --against: no indexing")
    options = parser.parse_args()
    if options.against:
        compare(options)
        return
    figures = {}
    for name, (size, full) in CASES.items():
        samples = full // QUICK if options.quick else full
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_shards(Path(folder) / "shards", size, samples)
            figures[name] = measure(Path(folder) / "shards", samples, 2 if options.quick else 3)
        print(f"images of {name}")
        for what, value in figures[name].items():
            print(f"  {what:30}{value:>12,}")
    where = machine("bigbatch", "numpy", "webdataset", quick=options.quick)
    write_figures(options.json, machine=where, figures=figures)


if __name__ == "__main__":
    main()
