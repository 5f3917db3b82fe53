"""Where images come from before they are shards: one Source, whatever the format."""

import io
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.data.index import find_shards, read_classes, scan_shards
from bigbatch.data.tar import IMAGE_EXTENSIONS

# What people call the three splits, and what we call them.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, eq=False)
class Source:
    """N labelled images that can be read in any order, also by other processes.

    keys[i] is unique and has no dot in its file name, so that it can be a WebDataset key;
    labels[i] is a number below len(classes). `splits`, where the source has its own, names
    each sample's split ("" for none). `groups`, where reading has a grain, numbers the
    blocks (such as Parquet row groups) that are cheap to read as a whole; `window` of them
    fit into memory at a time. read(i) returns the encoded image, or raises OSError.
    `fractions` is how train, val and test are divided where nobody says otherwise;
    `skipped` lists (what, why) of samples that were found unusable while listing.
    """

    keys: list[str]
    labels: npt.NDArray[np.int32]
    classes: tuple[str, ...]
    read: Callable[[int], bytes]
    splits: npt.NDArray[np.str_] | None = None
    groups: npt.NDArray[np.int64] | None = None
    window: int = 1
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    skipped: list[tuple[str, str]] = field(default_factory=list)


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


@dataclass(frozen=True, eq=False)
class _Files:
    """Reads whole files; paths are relative to `root`."""

    root: str
    paths: list[str]

    def __call__(self, i: int) -> bytes:
        with open(os.path.join(self.root, self.paths[i]), "rb") as file:
            return file.read()


def image_folder(root: Path) -> Source:
    """CLASS/*.jpg, or SPLIT/CLASS/*.jpg where the folders are train, val or test.

    Images may lie deeper below their class; hidden files are passed over. Classes are the
    folder names, sorted.
    """
    folders = _folders(root)
    own_splits = {
        name: SPLIT_NAMES[name.lower()] for name in folders if name.lower() in SPLIT_NAMES
    }
    if own_splits and len(own_splits) < len(folders):
        others = sorted(set(folders) - set(own_splits))
        raise UserError(
            f"{root} holds both splits ({', '.join(own_splits)}) and other folders "
            f"({', '.join(others[:3])}); give one folder for each split, or one for each class"
        )
    places = [(split, folder) for folder, split in own_splits.items()] or [("", "")]
    if len({split for split, _ in places}) < len(places):
        raise UserError(f"{root}: two folders mean the same split: {', '.join(own_splits)}")
    found = [
        (os.path.join(folder, name, file), split, name)
        for split, folder in places
        for name in _folders(root / folder)
        for file in _images(root / folder / name)
    ]
    if not found:
        raise UserError(
            f"{root} holds no images in class folders; expected CLASS/NAME.jpg or "
            f"SPLIT/CLASS/NAME.jpg with one of {', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    found.sort()
    classes = sorted({name for _, _, name in found})
    number = {name: i for i, name in enumerate(classes)}
    paths = [path for path, _, _ in found]
    return Source(
        keys=unique_keys(paths),
        labels=np.array([number[name] for _, _, name in found], np.int32),
        classes=tuple(map(printable, classes)),
        read=_Files(str(root), paths),
        splits=np.array([split for _, split, _ in found]) if own_splits else None,
    )


@dataclass(frozen=True, eq=False)
class _Ranges:
    """Reads byte ranges of archives."""

    paths: list[str]
    shards: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def __call__(self, i: int) -> bytes:
        with open(self.paths[self.shards[i]], "rb") as file:
            data = os.pread(file.fileno(), int(self.sizes[i]), int(self.offsets[i]))
        if len(data) < self.sizes[i]:
            raise OSError("the archive has become shorter")
        return data


def tars(path: Path, workers: int) -> Source:
    """WebDataset archives: one, a folder of *.tar, or SPLIT/*.tar; keys stay as they are.

    Class names come from a classes.txt beside or above the archives. Samples without a
    label, second ones of the same key, and what lies behind damage are skipped.
    """
    if path.is_file():
        files, splits = [path], [""]
    else:
        places = {p: SPLIT_NAMES.get(p.name.lower(), "") for p in path.iterdir() if p.is_dir()}
        folders = sorted(p for p, split in places.items() if split) or [path]
        files = [file for folder in folders for file in find_shards(folder)]
        splits = [places.get(file.parent, "") for file in files]
    scans = scan_shards(files, workers)
    taken: set[str] = set()
    rows, skipped = [], [(f"{problem}", "left out") for s in scans for problem in s.problems]
    for shard, scan in enumerate(scans):
        for i, key in enumerate(scan.keys):
            if key in taken:
                skipped.append((key, f"{files[shard].name}: has the key of an earlier sample"))
                continue
            taken.add(key)
            rows.append((key, shard, scan.offsets[i], scan.sizes[i], scan.labels[i]))
    if not rows:
        first = f"; the first problem: {skipped[0][0]}" if skipped else ""
        raise UserError(
            f"{path} holds no image with a label (.cls){first}; label the images, or unpack them "
            "into CLASS/NAME.jpg and shard that folder"
        )
    columns = np.array([row[1:] for row in rows], np.int64).T
    classes = read_classes(files[0].parent) or tuple(map(str, range(int(columns[3].max()) + 1)))
    if columns[3].max() >= len(classes):
        raise UserError(
            f"{path} has label {columns[3].max()}, but classes.txt names {len(classes)} classes; "
            "give each class a line"
        )
    return Source(
        keys=[row[0] for row in rows],
        labels=columns[3].astype(np.int32),
        classes=classes,
        read=_Ranges([str(f) for f in files], *columns[:3]),
        splits=np.array(splits)[columns[0]] if splits[0] else None,
        skipped=skipped,
    )


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a folder of images") from None


def _images(path: Path) -> Iterable[str]:
    """Image files at or below `path`, relative to it, unsorted."""

    def stop(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None

    for folder, _, files in os.walk(path, onerror=stop, followlinks=True):
        for file in files:
            if file.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not file.startswith("."):
                yield os.path.relpath(os.path.join(folder, file), path)


def unique_keys(names: Iterable[str]) -> list[str]:
    """WebDataset keys from file names: no extension, no dot in the file name, no two alike.

    A key that an earlier name took gets -2, -3, ... so names must come in a fixed order.
    """
    keys, taken = [], set()
    for name in names:
        folder, slash, base = printable(name).replace(os.sep, "/").rpartition("/")
        stem = base.rpartition(".")[0] or base
        key = first = folder + slash + stem.replace(".", "_")
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
