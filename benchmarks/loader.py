"""Images per second from shards to the trainer, against the usual pipelines.

    python benchmarks/loader.py [--quick] [--json FILE] [--photos TAR] [--workers N]
                                [--streaming-python PYTHON]

The photos of a tar file (without --photos: generated ones of about the same size) are
written as shards twice: as they are, and reduced to a short side of 256 pixels as `bigbatch
shard --short-side 256` does. Everything is in the page cache. Each contestant runs in a
process of its own with N workers (2), all take turns, and the median of the rounds counts;
of a share of a limit, the median of the pairs that ran one after the other:

    float    normalised float32 batches 64 x 3 x 224 x 224 in the trainer: random resized
             crop and horizontal flip. bigbatch crops in the trainer's process, the others in
             their workers: webdataset and mosaicml-streaming with torchvision's transforms,
             timm with its own, all from Pillow's decoder
    uint8    what a GPU run asks of the CPU: decoded images handed to the trainer, whole, at
             their full size

and beside each its limit, which is the same work in N processes on bytes in memory, with
nothing to read, to hand over or to keep in order:

    decode and crop alone   simplejpeg at the scale that the crop needs, torch's resampling,
                            normalisation
    simplejpeg alone        the decoder in a loop

CPU seconds and memory are of the trainer and its workers together; shared memory counts
once, and memory is the largest of several looks. `cores` is how many of them the contestant
had at work: on a machine with other load, compare CPU seconds. Start-up and the first batches
are outside the clock for all. mosaicml-streaming needs another NumPy than bigbatch: install it
into an environment of its own, beside everything that bigbatch needs, and give its interpreter.
Full: about twelve minutes.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import simplejpeg
import torch
from loader_contestants import BATCH, CONTESTANTS, SHARDS, encoded, make_augmenter
from machine import benchmark_parser, machine, write_figures
from PIL import Image

from bigbatch.data.augment.pipeline import Augmenter
from bigbatch.data.batch import MicroBatch
from bigbatch.data.decode import Jpeg, fill, open_pixels, reduced
from bigbatch.data.index import build_index
from bigbatch.data.tar import write_end, write_member
from bigbatch.data.writing.recode import prepare

CROP_BUFFER = np.empty(BATCH * 1000 * 1000 * 3, np.uint8)


LIMITS = {"bigbatch, float": "decode and crop alone", "bigbatch, uint8": "simplejpeg alone"}
LOOKS = 5  # at memory


def processes() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cpu_seconds() -> float:
    return sum(sum(p.cpu_times()[:2]) for p in processes())


def memory_mb() -> float:
    """Proportional set size: pages shared by several processes count once in all."""
    return float(sum(p.memory_full_info().pss for p in processes()) / 1e6)


def measure(contestant: str, folder: Path, workers: int, seconds: float) -> dict[str, float]:
    torch.set_num_threads(1)  # the cores are the workers'; ours crops one image after another
    started = time.perf_counter()
    batches = CONTESTANTS[contestant](folder, workers)
    next(batches)
    first = time.perf_counter() - started
    for _ in range(4 * workers):  # what was decoded before the clock starts
        next(batches)
    images = 0
    before, started = cpu_seconds(), time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        images += next(batches)
    cpu = cpu_seconds() - before
    memory = 0.0
    for _ in range(LOOKS):
        memory = max(memory, memory_mb())
        for _ in range(2 * workers):
            next(batches)
    return {**rates(images, spent, cpu), "memory_mb": memory, "first_batch_s": first}


def rates(images: int, seconds: float, cpu: float) -> dict[str, float]:
    return {
        "images_per_s": images / seconds,
        "cpu_s_per_1000": cpu / images * 1000,
        "cores": cpu / seconds,
    }


def decode_alone(data: list[bytes]) -> None:
    for image in data:
        simplejpeg.decode_jpeg(image)


def decode_and_crop_alone(data: list[bytes], step: int, augmenter: Augmenter) -> None:
    view, buffer = augmenter.view, CROP_BUFFER
    opened = [open_pixels(image, 3) for image in data]
    sizes = np.array([i[:2] if isinstance(i, Jpeg) else i.shape[:2] for i in opened])
    frames = view.frames(sizes, np.arange(len(data)), len(data), 10**9, step, 0)
    lengths = frames["height"] * frames["width"] * 3
    if lengths.sum() > buffer.size:
        buffer.resize(int(lengths.sum()), refcheck=False)
    ends = np.cumsum(lengths).tolist()
    for image, frame, end, length in zip(opened, frames, ends, lengths.tolist(), strict=True):
        place = buffer[end - length : end].reshape(frame["height"], frame["width"], 3)
        if isinstance(image, Jpeg):
            fill(place, image, int(frame["factor"]))
        else:  # what simplejpeg cannot decode: a few in a thousand
            place[:] = reduced(image, int(frame["factor"]), 3)
    batch = MicroBatch(
        step=step,
        index=0,
        samples=np.zeros(len(data), np.int64),
        labels=torch.zeros(len(data), dtype=torch.int64),
        pixels=torch.from_numpy(buffer[: ends[-1]]),
        sizes=torch.tensor([[int(f["height"]), int(f["width"])] for f in frames]),
        channels=3,
        stored=frames,
    )
    augmenter.normalise(augmenter.images(batch))


def measure_alone(limit: str, folder: Path, seconds: float) -> tuple[int, float, float]:
    """Images, CPU seconds and seconds of one process that has the images in memory."""
    torch.set_num_threads(1)
    data, augmenter, step = encoded(folder), make_augmenter(), 0
    count, cpu, started = 0, 0.0, 0.0
    while step < 3 or time.perf_counter() - started < seconds:
        if step == 2:  # warm
            count, cpu, started = 0, time.process_time(), time.perf_counter()
        some = [data[(step * BATCH + i) % len(data)] for i in range(BATCH)]
        if limit == "simplejpeg alone":
            decode_alone(some)
        else:
            decode_and_crop_alone(some, step, augmenter)
        count, step = count + BATCH, step + 1
    return count, time.process_time() - cpu, time.perf_counter() - started


def measure_limit(limit: str, folder: Path, workers: int, seconds: float) -> dict[str, float]:
    with get_context("spawn").Pool(workers) as pool:
        found = pool.starmap(measure_alone, [(limit, folder, seconds)] * workers, chunksize=1)
    together = [rates(count, spent, cpu) for count, cpu, spent in found]
    return {
        "images_per_s": sum(r["images_per_s"] for r in together),
        "cpu_s_per_1000": statistics.mean(r["cpu_s_per_1000"] for r in together),
        "cores": sum(r["cores"] for r in together),
    }


def photos_of(path: Path | None, count: int) -> list[bytes]:
    if path is None:
        return [generated_photo(seed) for seed in range(count)]
    with tarfile.open(path) as archive:
        files = [archive.extractfile(member) for member in archive if member.isfile()]
        return [file.read() for file in files if file is not None]


def generated_photo(seed: int) -> bytes:
    """A JPEG of 500 x 375 pixels or upright, with detail at every scale, of some 110 kB."""
    rng = np.random.default_rng(seed)
    width, height = (500, 375) if seed % 4 else (375, 500)
    total = np.zeros((height, width, 3))
    for octave in range(8):
        small = rng.normal(size=(2**octave + 1, 2**octave + 1, 3)) * 0.95**octave
        for channel in range(3):
            layer = Image.fromarray(small[..., channel].astype(np.float32))
            total[..., channel] += layer.resize((width, height), Image.Resampling.BICUBIC)
    pixels = 128 + total * 45
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_shards(folder: Path, photos: list[bytes], samples: int, short_side: int | None) -> None:
    folder.mkdir()
    ready = [prepare(photo, short_side, 90)[0] for photo in photos]
    for number in range(SHARDS):
        with (folder / f"{number:06d}.tar").open("wb") as file:
            for i in range(number * samples // SHARDS, (number + 1) * samples // SHARDS):
                write_member(file, f"{i:08d}.jpg", ready[i % len(ready)])
                write_member(file, f"{i:08d}.cls", str(i % 10).encode())
            write_end(file)
    build_index(folder)


def in_own_process(python: str, *arguments: str) -> dict[str, float] | None:
    """The figures of one contestant; None where it cannot run, with its last line shown."""
    command = [python, __file__, "--only", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        print(f"{arguments[0]} did not run: {lines[-1] if lines else done.returncode}")
        return None
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = benchmark_parser(__doc__, quick="one round of 2 s, few photos")
    parser.add_argument("--photos", type=Path, help="tar of JPEG photos")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--streaming-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        name, folder, workers, seconds = options.only
        arguments = Path(folder), int(workers), float(seconds)
        work = measure_limit if name in LIMITS.values() else measure
        print(json.dumps(work(name, *arguments)))
        os._exit(0)  # some loaders wait at exit for workers that they never stop
    rounds, seconds = (1, 1.0) if options.quick else (3, 7.0)
    # Those with a limit take turns with it, as the machine's other load changes.
    turns = [
        turn
        for name in CONTESTANTS
        for turn in (2 * [name, LIMITS[name]] if name in LIMITS else [name])
    ]
    photos = photos_of(options.photos, 24 if options.quick else 240)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as root:
        cases = {"photos": None, "short side 256": 256}
        for case, short_side in cases.items():
            folder = Path(root) / case.replace(" ", "-")
            write_shards(folder, photos, 480 if options.quick else 3840, short_side)
            found[case] = {name: [] for name in turns}
        for _ in range(rounds):
            for case, runs in found.items():
                for name in turns:
                    python = options.streaming_python if "streaming" in name else sys.executable
                    folder = Path(root) / case.replace(" ", "-")
                    arguments = (name, str(folder), str(options.workers), str(seconds))
                    run = in_own_process(python, *arguments)
                    if run is not None:
                        runs[name].append(run)
    medians = {
        case: {
            name: {key: round(statistics.median(r[key] for r in runs), 3) for key in runs[0]}
            for name, runs in rows.items()
            if runs
        }
        for case, rows in found.items()
    }
    shares = {
        case: {
            name: round(statistics.median(share_of_limit(rows[name], rows[limit])), 4)
            for name, limit in LIMITS.items()
        }
        for case, rows in found.items()
    }
    report(medians, shares)
    where = machine(
        *("torch", "torchvision", "webdataset", "timm", "simplejpeg", "pillow"),
        workers=options.workers,
        photos=len(photos),
        bytes_per_photo=round(statistics.mean(map(len, photos))),
        rounds=rounds,
        seconds=seconds,
    )
    write_figures(options.json, machine=where, figures=medians, share_of_limit=shares)


def share_of_limit(runs: list[dict[str, float]], alone: list[dict[str, float]]) -> list[float]:
    """In each pair of turns that followed each other."""
    return [a["images_per_s"] / b["images_per_s"] for a, b in zip(runs, alone, strict=True)]


def report(
    medians: dict[str, dict[str, dict[str, float]]], shares: dict[str, dict[str, float]]
) -> None:
    columns = ("images_per_s", "cpu_s_per_1000", "cores", "memory_mb", "first_batch_s")
    usual = medians["photos"].get("webdataset, float", {}).get("images_per_s")
    for case, rows in medians.items():
        print(f"\n{case:28}" + "".join(f"{c:>16}" for c in (*columns, "x webdataset")))
        for name, row in rows.items():
            cells = [f"{row[c]:16,.2f}" if c in row else " " * 16 for c in columns]
            ratio = f"{row['images_per_s'] / usual:16.2f}" if usual else ""
            print(f"{name:28}" + "".join(cells) + ratio)
        for name, limit in LIMITS.items():
            share = shares[case][name]
            work = rows[limit]["cpu_s_per_1000"] / rows[name]["cpu_s_per_1000"]
            print(f"{name}: {share:.1%} of {limit}; {work:.1%} of its CPU time is that work")


if __name__ == "__main__":
    main()
