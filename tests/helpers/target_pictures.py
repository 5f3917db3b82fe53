"""Small gray pictures whose targets are functions of their pixels, as shards."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bigbatch.data.index import build_index
from tests.helpers.archives import pack

SIDE = 16
SPLITS = (("train", 512), ("val", 96), ("test", 64))


def picture(number: int) -> tuple[bytes, list[float], list[float]]:
    """A spot on noise: the PNG, its place and size in units of their own, shares of 3 classes."""
    rng = np.random.default_rng(number)
    x, y, size = rng.uniform(4, 12), rng.uniform(4, 12), rng.uniform(1, 3)
    grid = np.arange(SIDE)
    spot = np.exp(-((grid[:, None] - y) ** 2 + (grid - x) ** 2) / (2 * size**2))
    pixels = np.clip(20 + 200 * spot + rng.normal(0, 4, (SIDE, SIDE)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    place = (x - 4) / 8
    shares = np.array([(1 - place) ** 2, 2 * place * (1 - place), place**2])
    return file.getvalue(), [1000 + 100 * x, size], shares.tolist()


def write_pictures(root: Path, kind: str, splits: Sequence[tuple[str, int]] = SPLITS) -> Path:
    """Shards of `kind`: numbers (two each, without labels), one (the first, likewise), or shares,
    with the most likely class as a label."""
    start = 0
    for split, count in splits:
        members = []
        for i in range(start, start + count):
            image, numbers, shares = picture(i)
            target = {"numbers": numbers, "one": numbers[0], "shares": shares}[kind]
            members.append((f"{i:06d}.png", image))
            if kind == "shares":
                members.append((f"{i:06d}.cls", str(int(np.argmax(shares))).encode()))
            members.append((f"{i:06d}.target.json", json.dumps(target).encode()))
        pack(root / split / "000000.tar", *members)
        build_index(root / split, classes=("left", "middle", "right") if kind == "shares" else None)
        start += count
    return root


RECIPE = (
    "seed=1",
    "duration=8 epochs",
    "global_batch=64",
    "micro_batch=16",
    "data.sampling=uniform",
    "data.image_size=16",
    "data.workers=0",
    "augment.affine=null",
    "augment.mixup=0",
    "augment.mean=[0.2]",
    "augment.std=[0.2]",
    "optimizer={name: sgd, lr: 0.05, momentum: 0.9, nesterov: true}",
    "schedule={name: cosine, warmup: 1 epochs}",
    "evaluate={every: 1 epochs, batch: 32}",
    "checkpoint={every: 2 epochs}",
    "log.wandb=off",
)


def recipe_of(data: Path, loss: str, *more: str) -> list[str]:
    """Changes to the digits recipe that learn the shards of `write_pictures`."""
    return [f"data.path={data}", f"loss={loss}", *RECIPE, *more]
