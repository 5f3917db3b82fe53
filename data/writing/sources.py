"""Where images come from before they are shards: one Source, whatever the format."""

import io
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bigbatch.data.samples import META


@dataclass(frozen=True, eq=False)
class Source:
    """N labelled images that can be read in any order, also by other processes.

    keys[i] is unique in its split and has no dot in its file name, so that it can be a
    WebDataset key; labels[i] is a number below len(classes). `splits`, where the source has
    its own, names each sample's split ("" for none). `groups`, where reading has a grain,
    numbers the blocks (such as Parquet row groups) that are cheap to read as a whole;
    `window` of them fit into memory at a time, and a process that reads holds up to `held`
    bytes of them. read(i) returns the encoded image, or raises OSError.
    `targets`, where samples have any, are the float32 numbers of each; where they have no labels,
    all are 0, of the class UNLABELLED. `fractions` is how train, val and test are divided where
    nobody says otherwise; `skipped` lists (what, why) of samples that were found unusable while
    listing, and of files that are no part of it; `notes` are what else its user should know.
    """

    keys: list[str]
    labels: npt.NDArray[np.int32]
    classes: tuple[str, ...]
    read: Callable[[int], bytes]
    splits: npt.NDArray[np.str_] | None = None
    groups: npt.NDArray[np.int64] | None = None
    window: int = 1
    held: int = 0
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    targets: list[bytes] | None = None


@dataclass(frozen=True, eq=False)
class _Pixels:
    """Reads images out of an array, uint8 [N, H, W], as PNG."""

    images: npt.NDArray[np.uint8]

    def __call__(self, i: int) -> bytes:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(self.images[i]).save(file, "PNG", optimize=True)
        return file.getvalue()


def digits() -> Source:
    """Scikit-learn's handwritten digits: 1,797 scans of 8 x 8 pixels, from NIST via UCI.

    Values 0..16 become 8-bit gray, round(value * 255 / 16).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Source(
        keys=[f"{row:04d}" for row in range(len(bunch.target))],
        labels=bunch.target.astype(np.int32),
        classes=tuple(map(str, bunch.target_names)),
        read=_Pixels(np.round(bunch.images * (255 / 16)).astype(np.uint8)),
        fractions=(0.6, 0.2, 0.2),
    )


def unique_keys(names: Iterable[str]) -> list[str]:
    """WebDataset keys from file names: no extension, no dot in the file name, no two alike.

    A key that an earlier name took gets -2, -3, ... so names must come in a fixed order.
    """
    keys, taken = [], set()
    for name in names:
        folder, slash, base = printable(name).replace(os.sep, "/").rpartition("/")
        stem = base.rpartition(".")[0] or base
        key = folder + slash + stem.replace(".", "_")
        if META.match(key):  # which every reader would pass over
            key = f"x{key}"
        first = key
        number = 1
        while key in taken:
            number += 1
            key = f"{first}-{number}"
        taken.add(key)
        keys.append(key)
    return keys


def printable(name: str) -> str:
    """Valid UTF-8 on one line: a file name may be any bytes, a key or class name may not."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return re.sub(r"[\x00-\x1f\x7f]", "_", text)
