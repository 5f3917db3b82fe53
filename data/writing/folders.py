"""Images in folders: the folder says the class, and perhaps the split."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigbatch.configs.errors import UserError
from bigbatch.data.samples import IMAGE_EXTENSIONS
from bigbatch.data.splits import SPLIT_NAMES
from bigbatch.data.tar import compressed
from bigbatch.data.writing.sources import Source, printable, unique_keys
from bigbatch.data.writing.tree import Tree, walk

# How the files of those formats begin that often have no extension.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True, eq=False)
class _Files:
    """Reads whole files; paths are relative to `root`."""

    root: str
    paths: list[str]

    def __call__(self, i: int) -> bytes:
        with open(os.path.join(self.root, self.paths[i]), "rb") as file:
            return file.read()


def image_folder(root: Path, tree: Tree | None = None) -> Source:
    """CLASS/NAME.jpg, or SPLIT/CLASS/NAME.jpg or CLASS/SPLIT/NAME.jpg with splits named so.

    Images may lie deeper; a file without an extension is one if it begins as one. Classes are
    the folder names, sorted. What else lies there is passed over, and named, as are class
    folders without an image. `tree` is what lies below `root`.
    """
    tree = tree or walk(root)
    images = images_of(tree)
    own = _own_splits(root, images)
    parts = [path.split("/") for path in images]
    first = _split_place(root, images) if not own else 0
    names, splits, paths = [], [], []
    for path, part in zip(images, parts, strict=True):
        depth = 2 if own else 1
        if len(part) <= depth:
            tree.passes_over(path, "an image in no class folder")
            continue
        names.append(part[1] if own else part[0])
        splits.append(SPLIT_NAMES[part[first].lower()] if own or first else "")
        paths.append(path)
    if not paths:
        raise UserError(
            f"{root} holds no images in class folders{compressed(root)}; expected CLASS/NAME.jpg "
            f"or SPLIT/CLASS/NAME.jpg with one of {', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    classes = sorted(set(names))
    _name_empty_classes(tree, classes, 1 if own else 0)
    number = {name: i for i, name in enumerate(classes)}
    return Source(
        keys=unique_keys(paths),
        labels=np.array([number[name] for name in names], np.int32),
        classes=tuple(map(printable, classes)),
        read=_Files(str(root), paths),
        splits=np.array(splits) if own or first else None,
        skipped=tree.skipped,
    )


def images_of(tree: Tree) -> list[str]:
    """The paths that are images by their extension, or without one by their first bytes."""
    images = []
    for path in tree.files:
        stem, dot, extension = path.rpartition("/")[2].rpartition(".")
        if not dot:
            if begins_as_image(tree.root / path):
                images.append(path)
            else:
                tree.passes_over(path, "no extension, and no image")
        elif extension.lower() in IMAGE_EXTENSIONS and stem:
            images.append(path)
        else:
            tree.passes_over(path, "not the extension of an image that is read")
    return images


def begins_as_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return False
    return start.startswith(_SIGNATURES) or start[8:12] in (b"WEBP", b"avif")


def _own_splits(root: Path, images: Sequence[str]) -> bool:
    """Whether the folders at the top are splits; UserError where only some of them are."""
    folders = sorted({path.split("/")[0] for path in images if "/" in path})
    own = [name for name in folders if name.lower() in SPLIT_NAMES]
    if own and len(own) < len(folders):
        others = [name for name in folders if name not in own]
        raise UserError(
            f"{root} holds both splits ({', '.join(own)}) and other folders "
            f"({', '.join(others[:3])}); give one folder for each split, or one for each class"
        )
    if len({SPLIT_NAMES[name.lower()] for name in own}) < len(own):
        raise UserError(f"{root}: two folders mean the same split: {', '.join(own)}")
    return bool(own)


def _split_place(root: Path, images: Sequence[str]) -> int:
    """1 where every class folder is divided into splits, CLASS/train and CLASS/val, else 0.

    UserError where only some are: dividing those anew would mix what was kept apart.
    """
    places = Counter(SPLIT_NAMES.get(_second(path).lower(), "") for path in images if "/" in path)
    named = [split for split in places if split]
    if len(named) < 2:  # one alone may mean a locomotive
        return 0
    if places[""]:
        outside = next(path for path in images if _second(path).lower() not in SPLIT_NAMES)
        inside = next(path for path in images if _second(path).lower() in SPLIT_NAMES)
        raise UserError(
            f"{root}: some images lie in splits below their class ({printable(inside)}), others do "
            f"not ({printable(outside)}); give each a split (SPLIT/CLASS), or rename those folders"
        )
    return 1


def _second(path: str) -> str:
    """The folder below the first one, or ''."""
    parts = path.split("/")
    return parts[1] if len(parts) > 2 else ""


def _name_empty_classes(tree: Tree, classes: Sequence[str], depth: int) -> None:
    """Note folders where classes stand, in which no image was found."""
    folders = {path.split("/")[depth] for path in tree.folders if path.count("/") >= depth}
    folders.discard("")  # the top
    for name in sorted(folders - set(classes)):
        tree.passes_over(f"{name}/", "a class folder without an image")
