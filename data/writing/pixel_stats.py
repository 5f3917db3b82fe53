"""Mean, standard deviation and principal axes of a split's pixels, for a recipe to say.

Every image counts the same, whatever its size, as it does in training. Sums of one image's pixels
are exact, and those over images are rounded once, so that the figures depend on neither threads
nor order.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.data.decode import Jpeg, fill, open_pixels
from bigbatch.data.index import Index, open_index
from bigbatch.data.order import permute
from bigbatch.data.read import BadSample, ShardReader
from bigbatch.data.rng import key64

Floats = npt.NDArray[np.float64]
IMAGES = 10_000  # that are measured where nobody says how many; `mean_error` is for them
_AT_ONCE = 1 << 18  # pixels: sums of their products are below 2^53, and so exact in float64


@dataclass(frozen=True)
class PixelStatistics:
    """Of pixels in [0, 1] of `images` images; `mean_error` is the standard error of the mean."""

    images: int
    of: int  # images of the split
    unreadable: int
    mean: Floats  # [C]
    std: Floats  # [C], of all pixels
    mean_error: Floats  # [C]; 0 where all images were measured
    eigenvalues: Floats  # [C] of the covariance of channels, falling
    eigenvectors: Floats  # [C, C], a column for each

    def recipe(self, *, pca: bool) -> dict[str, Any]:
        """The keys of a recipe that say it, rounded to four digits."""
        augment: dict[str, Any] = {"mean": _rounded(self.mean), "std": _rounded(self.std)}
        if pca:
            values = [float(f"{value:.4g}") for value in self.eigenvalues]
            vectors = [_rounded(row) for row in self.eigenvectors]
            op = {"name": "pca", "eigenvalues": values, "eigenvectors": vectors}
            augment["ops"] = [op]
        return {"data": {"channels": len(self.mean)}, "augment": augment}


def _rounded(values: Floats) -> list[float]:
    return [round(float(value), 4) for value in values]


def measure(
    root: Path, *, images: int = 0, channels: int | None = None, threads: int = 1
) -> PixelStatistics:
    """Statistics of the training split of DEST, or of the one split that `root` is.

    Of `images` drawn at random, always the same ones, or of all (0). `channels` are 1 or 3, by
    default 1 where all images are gray. Unreadable images are left out. Raises UserError where
    there is no training split, or nothing to read.
    """
    root = Path(root)
    index = open_index(root / "train" if (root / "train").is_dir() else root)
    count = min(images, len(index)) or len(index)
    numbers = np.arange(count, dtype=np.uint64)
    size, key = np.uint64(len(index)), np.uint64(key64(index.hash, "statistics"))
    chosen = np.sort(permute(numbers, size, key).view(np.int64))
    reader = ShardReader([index.root / shard.name for shard in index.shards], loose=index.loose)

    def look(sample: int) -> Floats | None:
        try:
            return _moments(_pixels(reader, index, sample, channels or 3))
        except BadSample:
            return None

    with ThreadPoolExecutor(threads) as pool:
        found = [m for m in pool.map(look, chosen.tolist()) if m is not None]
    if not found:
        raise UserError(f"{index.place} has no image that could be read; repair the shards")
    each = np.stack(found)  # [images, C + 1, C]: first and second moments
    if channels is None and bool((each == each[:, :, :1]).all()):  # red is green is blue
        each = each[:, :2, :1]
    moments = np.apply_along_axis(math.fsum, 0, each) / len(each)
    mean, covariance = moments[0], moments[1:] - np.outer(moments[0], moments[0])
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    eigenvalues, eigenvectors = eigenvalues[::-1], eigenvectors[:, ::-1]
    largest = np.abs(eigenvectors).argmax(0)[None]
    eigenvectors = eigenvectors * np.sign(np.take_along_axis(eigenvectors, largest, 0))
    left = 1 - len(each) / len(index)  # of a finite population
    error = each[:, 0].std(0, ddof=min(1, len(each) - 1)) * math.sqrt(left / len(each))
    return PixelStatistics(
        images=len(each),
        of=len(index),
        unreadable=count - len(each),
        mean=mean / 255,
        std=np.sqrt(covariance.diagonal()) / 255,
        mean_error=error / 255,
        eigenvalues=eigenvalues.clip(0) / 255**2,  # arithmetic may leave less than 0
        eigenvectors=eigenvectors,
    )


def _pixels(reader: ShardReader, index: Index, sample: int, channels: int) -> npt.NDArray[np.uint8]:
    """[N, C], of the whole image, as large as it is."""
    place = (getattr(index, name)[sample] for name in ("shard", "offset", "size", "crc"))
    image = open_pixels(reader.read(*(int(value) for value in place)), channels)
    if isinstance(image, Jpeg):
        jpeg, image = image, np.empty((image.height, image.width, channels), np.uint8)
        fill(image, jpeg, 1)
    return image.reshape(-1, channels)


def _moments(pixels: npt.NDArray[np.uint8]) -> Floats:
    """Means [C], and below them means of products of channels [C, C], of pixels [N, C]."""
    channels = pixels.shape[1]
    sums = np.zeros((channels + 1, channels))
    for start in range(0, len(pixels), _AT_ONCE):
        some = pixels[start : start + _AT_ONCE].astype(np.float64)
        sums[0] += some.sum(0)
        sums[1:] += some.T @ some
    found: Floats = sums / len(pixels)
    return found
