"""Micro-batches of small pictures, made in all the ways there are, and compared."""

import io
from dataclasses import fields, replace

import numpy as np
import psutil
from PIL import Image

from bigbatch.configs.sampling import Balanced
from bigbatch.data.batch import BatchPlan, Decoding
from bigbatch.data.index import build_index
from bigbatch.data.loader import train_batches
from bigbatch.data.order import build_order
from bigbatch.data.tar import write_end, write_member

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


def damage(index, samples):
    """Change bytes of samples in the shards; a reader finds another CRC."""
    for sample in samples:
        with (index.root / index.shards[index.shard[sample]].name).open("r+b") as file:
            file.seek(int(index.offset[sample]) + 20)
            file.write(b"damage")


PLAN = BatchPlan(global_batch=32, micro_batch=4, rank=0, world=1, start_step=0, stop_step=2)
DECODING = Decoding(SIZE, channels=3, workers=0, threads=1)


def planned(changes, plan=PLAN, decoding=DECODING):
    """A plan and a decoding with these fields changed, of whichever they are."""
    plans = {field.name for field in fields(BatchPlan)}
    ours = {name: value for name, value in changes.items() if name in plans}
    others = {name: value for name, value in changes.items() if name not in plans}
    return replace(plan, **ours), replace(decoding, **others)


def batches_of(index, sampling=BALANCED, order=None, **changes):
    order = order or build_order(sampling, index, 5)
    return train_batches(index, order, *planned(changes))


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


def workers_alive():
    return [
        p
        for p in psutil.Process().children()
        if p.status() != psutil.STATUS_ZOMBIE and "bigbatch.data.workers" in p.cmdline()
    ]
