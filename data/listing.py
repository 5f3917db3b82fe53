"""Images to predict, with labels or without: shards, tars, a folder of images, or a list of them.

Unlike an index, a listing leaves nothing out: what cannot be read is found when it is read, and
gets a row with the reason.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.data.classes import read_classes
from bigbatch.data.index import (
    MAX_UNNAMED,
    Index,
    ShardFile,
    find_shards,
    is_shard,
    members_passed_over,
    open_index,
    scan_shards,
)
from bigbatch.data.remote import open_remote, remote_at
from bigbatch.data.samples import IMAGE_EXTENSIONS
from bigbatch.data.staging import is_url
from bigbatch.data.writing.folders import images_of
from bigbatch.data.writing.sources import printable
from bigbatch.data.writing.tree import walk

_LARGEST = (1 << 32) - 1  # bytes that an index's column can say; such an image is refused as read


@dataclass(frozen=True, eq=False)
class Listing:
    """N images in a fixed order. `index.label` are numbers in the classes asked for, -1: unknown.

    `unreadable` are (key, reason) of what is no image that could be read at all; `notes` what a
    user should know.
    """

    index: Index
    keys: list[str]
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_listing(source: str, classes: Sequence[str], workers: int = 1) -> Listing:
    """The images of `source`, whose labels are numbers in `classes`, found by their names.

    A folder or a URL with an index; a folder of tars, or one; a folder of images, in folders
    named as their class or not; an image; or a .txt file with the path of an image on each line,
    from the current folder. Raises UserError where it is none of these, or holds no image.
    """
    if is_url(source):
        return _indexed(open_remote(remote_at(source, None, 100.0)), classes)
    path = Path(source)
    if path.is_dir():
        tars = any(is_shard(entry.name) for entry in path.iterdir())
        if _has_index(path) or (tars and (path / "index").is_dir()):
            return _indexed(open_index(path), classes)
        if tars:
            return _tars(path, files := find_shards(path), classes, workers, _beside(path, files))
        if splits := [entry.name for entry in sorted(path.iterdir()) if _has_index(entry)]:
            raise UserError(
                f"{path} holds the splits {', '.join(splits)}; give one of them, such as "
                f"{path / splits[0]}"
            )
        return _folder(path, classes)
    if not path.exists():
        raise UserError(
            f"no source {source!r}; give shards, tars, a folder of images, an image, or a .txt "
            "file that lists images"
        )
    if is_shard(path.name):
        return _tars(path.parent, [path], classes, workers)
    if path.suffix.lower() == ".txt":
        return _list(path)
    if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS:
        return _files(path.parent, [path.name], np.full(1, -1, np.int32))
    raise UserError(
        f"{path} is neither an image, a .tar, nor a .txt file that lists images; give one of "
        "these, or a folder"
    )


def _has_index(path: Path) -> bool:
    """A folder named index alone may hold the images of a class."""
    return (path / "index" / "manifest.json").is_file()


def _beside(root: Path, files: Sequence[Path]) -> list[str]:
    """What a folder of archives holds that is not read: images beside them, and other archives."""
    tree = walk(root)
    read = {file.name for file in files}
    others = [p for p in tree.files if is_shard(p.rpartition("/")[2]) and p not in read]
    kinds = (("images beside its archives", images_of(tree)), ("archives below it", others))
    return [
        f"{root}: {len(paths):,} {what} are passed over, such as {printable(paths[0])}; give "
        "their folder, or list them"
        for what, paths in kinds
        if paths
    ]


def _indexed(index: Index, classes: Sequence[str]) -> Listing:
    notes = []
    if index.problems:
        notes.append(
            f"{index.place}: {len(index.problems):,} samples were left out when it was indexed; "
            f"`bigbatch inspect {index.place}` names them"
        )
    known = replace(index, label=_by_name(index.label, index.classes, classes, index.place, notes))
    return Listing(known, index.keys(), [], notes)


def _by_name(
    labels: npt.NDArray[np.int32],
    named: Sequence[str],
    classes: Sequence[str],
    place: str,
    notes: list[str],
) -> npt.NDArray[np.int32]:
    """Labels by `named` as numbers in `classes`: -1 where a class is not among them."""
    if tuple(named) == tuple(classes):
        return labels
    number = {name: i for i, name in enumerate(classes)}
    to = np.array([*(number.get(name, -1) for name in named), -1], np.int32)
    found = to[labels]  # -1 stays -1
    lost = sorted({named[label] for label in np.unique(labels) if label >= 0 and to[label] < 0})
    if lost:
        notes.append(
            f"{place}: {len(lost):,} of its classes are none of the model's "
            f"({', '.join(map(printable, lost[:3]))}{', ...' if len(lost) > 3 else ''}); their "
            f"{int(((found < 0) & (labels >= 0)).sum()):,} images have no target"
        )
    elif not np.array_equal(found, labels):
        notes.append(f"{place} numbers its classes in another way; labels go by their names")
    return found


def _tars(
    root: Path,
    files: list[Path],
    classes: Sequence[str],
    workers: int,
    beside: Sequence[str] = (),
) -> Listing:
    scans = scan_shards(files, workers, unlabelled=True)
    notes = [*beside] + [f"{root}: {n:,} {what}" for what, n in members_passed_over(scans).items()]
    named = read_classes(root)
    shard = np.repeat(np.arange(len(scans)), [len(scan.keys) for scan in scans])
    label = np.array([label for scan in scans for label in scan.labels], np.int32)
    most = int(label.max(initial=-1))
    if most >= (MAX_UNNAMED if named is None else len(named)):
        told = f"{MAX_UNNAMED:,} classes without a" if named is None else f"{len(named):,} in its"
        raise UserError(f"{root} has label {most}, beyond {told} classes.txt; give each a line")
    if named is None:  # numbers are then their own names, as `bigbatch index` has it
        named = tuple(map(str, range(most + 1)))
    keys = [key for scan in scans for key in scan.keys]
    if len(set(keys)) < len(keys):
        keys = [f"{files[s].name}/{key}" for s, key in zip(shard, keys, strict=True)]
        notes.append(f"{root}: keys repeat, so that each has its archive's name before it")
    index = _index(
        root,
        [
            ShardFile(f.name, scan.bytes, len(scan.keys))
            for f, scan in zip(files, scans, strict=True)
        ],
        shard=shard,
        offset=[offset for scan in scans for offset in scan.offsets],
        size=[size for scan in scans for size in scan.sizes],
        crc=[crc for scan in scans for crc in scan.crcs],
        label=_by_name(label, named, classes, str(root), notes),
    )
    unreadable = [(where, what) for scan in scans for where, what in scan.problems]
    if not keys and not unreadable:
        raise UserError(f"{root} holds no image in its archives; give others")
    return Listing(index, keys, unreadable, notes)


def _folder(root: Path, classes: Sequence[str]) -> Listing:
    """Images at any depth; the topmost folder above one that is a class gives its label."""
    tree = walk(root)
    paths = images_of(tree)
    if not paths:
        raise UserError(f"{root} holds no image; give a folder that does")
    number = {name: i for i, name in enumerate(classes)}
    label = [
        next((number[part] for part in path.split("/")[:-1] if part in number), -1)
        for path in paths
    ]
    listing = _files(root, paths, np.array(label, np.int32))
    if tree.skipped:
        what, why = tree.skipped[0]
        more = f", and {len(tree.skipped) - 1:,} more" if len(tree.skipped) > 1 else ""
        listing.notes.append(f"{root}: passed over {what} ({why}){more}")
    return listing


def _list(path: Path) -> Listing:
    lines = os.fsdecode(path.read_bytes().removeprefix(b"\xef\xbb\xbf")).split("\n")
    names = [line.removesuffix("\r") for line in lines]
    odd = [(printable(name), "no file can have this name") for name in names if "\0" in name]
    names = [name for name in names if name.strip() and "\0" not in name]
    if not names:
        raise UserError(f"{path} lists no image; give a path on each line")
    return replace(_files(Path(), names, np.full(len(names), -1, np.int32)), unreadable=odd)


def _files(root: Path, names: Sequence[str], label: npt.NDArray[np.int32]) -> Listing:
    """Image files, each a "shard" of its own; one that is missing is met when it is read."""
    sizes = [_size(root / name) for name in names]
    count = len(names)
    index = _index(
        root,
        [ShardFile(name, size, 1) for name, size in zip(names, sizes, strict=True)],
        shard=np.arange(count),
        offset=[0] * count,
        size=sizes,
        crc=[0] * count,
        label=label,
        loose=True,
    )
    return Listing(index, [printable(name) for name in names])


def _size(path: Path) -> int:
    try:
        return min(path.stat().st_size, _LARGEST)
    except OSError:
        return 0


def _index(
    root: Path,
    files: Sequence[ShardFile],
    *,
    shard: npt.ArrayLike,
    offset: npt.ArrayLike,
    size: npt.ArrayLike,
    crc: npt.ArrayLike,
    label: npt.NDArray[np.int32],
    loose: bool = False,
) -> Index:
    """An index that is in memory alone, of images whose classes do not matter."""
    return Index(
        root=root,
        shard=np.asarray(shard, np.uint32),
        offset=np.asarray(offset, np.uint64),
        size=np.asarray(size, np.uint32),
        label=label,
        crc=np.asarray(crc, np.uint32),
        class_starts=np.zeros(1, np.int64),
        class_members=np.zeros(0, np.uint32),
        classes=(),
        shards=tuple(files),
        problems=(),
        passed_over={},
        hash="",
        loose=loose,
    )
