"""Random trees and archives: each input file becomes a sample with its right label and pixels, or
is named among what was left out."""

import io
import itertools
import json
import os
import random
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google_crc32c import value as crc32c
from PIL import Image
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from bigbatch.configs.errors import UserError
from bigbatch.data.index import build_index, open_index
from bigbatch.data.samples import IMAGE_EXTENSIONS, scan_shard
from bigbatch.data.splits import SPLIT_NAMES
from bigbatch.data.tar import write_end, write_member
from bigbatch.data.writing.kinds import open_source
from bigbatch.data.writing.shard import shard


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of small trees should not wait for disks."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    with tempfile.TemporaryDirectory(dir=memory if usable else None) as folder:
        yield Path(folder)


FORMATS = {"jpg": "JPEG", "JPE": "JPEG", "jfif": "JPEG", "png": "PNG", "PNG": "PNG", "bmp": "BMP"}


@lru_cache
def encoded(number: int, form: str = "PNG") -> bytes:
    """A picture of 4 x 4 pixels, all of one colour that `number` tells."""
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (number * 4 & 255, 255 - number & 255, 77)).save(out, form, quality=95)
    return out.getvalue()


# ---------------------------------------------------------------- folders


def plant(root: Path, rng: random.Random) -> None:
    """A random tree: class folders, perhaps in splits, with what people and systems put there."""
    tops = rng.choice([[""], [""], ["train", "val"], ["Train", "test", "validation"]])
    below = rng.choice([[""], [""], [""], ["train", "val"]]) if tops == [""] else [""]
    classes = rng.sample(["ant", "bee", "c.o w", "dög", "Elk", "test set"], rng.randint(1, 4))
    number = itertools.count(rng.randrange(1000))
    for top, name, split in itertools.product(tops, classes, below):
        folder = root / top / name / split
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(rng.randint(0, 5)):
            plant_file(folder / rng.choice(["", "", "deep", "deep/er"]), next(number), rng)
    for _ in range(rng.randint(0, 4)):
        plant_oddity(root, next(number), rng)


def plant_file(folder: Path, number: int, rng: random.Random) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = rng.choice(["{}", "{}", "a.b{}", "{} x", "字{}", "{}\udcff", "new\n{}"]).format(number)
    extension = rng.choice([*FORMATS, "jpg", "png", "", "txt", "heic", "tif"])
    data = encoded(number % 64, FORMATS.get(extension, "TIFF" if extension == "tif" else "JPEG"))
    if extension in ("txt", "heic") or rng.random() < 0.05:
        data = rng.choice([b"no image", b"", data[: len(data) // 2]])
    (folder / (f"{name}.{extension}" if extension else name)).write_bytes(data)


def plant_oddity(root: Path, number: int, rng: random.Random) -> None:
    folders = [root, *(p for p in sorted(root.rglob("*")) if p.is_dir() and not p.is_symlink())]
    folder = rng.choice(folders)
    kind = rng.randrange(9)
    link = folder / f"link{number}"
    if kind == 0:
        plant_file(
            folder / rng.choice([".thumbnails", "@eaDir", ".ipynb_checkpoints"]), number, rng
        )
    elif kind == 1:
        (folder / f".hidden{number}.jpg").write_bytes(encoded(number % 64))
    elif kind == 2:
        link.symlink_to(rng.choice([".", "..", link.name]))
    elif kind == 3:
        link.symlink_to(rng.choice(folders))
    elif kind == 4:
        link.with_suffix(".jpg").symlink_to("nowhere.jpg")
    elif kind == 5:
        files = [p for p in sorted(folder.iterdir()) if p.is_file()]
        link.with_suffix(".jpg").symlink_to(rng.choice(files) if files else "nowhere.jpg")
    elif kind == 6:
        os.mkfifo(link.with_suffix(".jpg"))
    elif kind == 7:
        (folder / "README").write_text("no image")
    else:
        (folder / f"empty{number}").mkdir()


def everything_below(root: Path) -> list[str]:
    """All paths that are no folders, links to folders among them; no link is followed."""
    found = []
    for folder, folders, files in os.walk(root):
        inside = [*files, *(d for d in folders if os.path.islink(os.path.join(folder, d)))]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in inside]
    return found


def shown(name: str) -> str:
    """As skipped.txt shows a name."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join("_" if ord(c) < 32 or ord(c) == 127 else c for c in text)


def class_of(path: str, own_splits: bool) -> str:
    return shown(path.split("/")[1 if own_splits else 0])


REFUSALS = ("holds no images in class", "holds both splits", "some images lie in splits below")


def check_folder(root: Path) -> Any:
    """The source, or None where the tree is refused."""
    try:
        source = open_source(str(root))
    except UserError as error:
        if any(what in str(error) for what in REFUSALS):
            return None
        raise
    paths: list[str] = source.read.paths
    own_splits = all(path.split("/")[0].lower() in SPLIT_NAMES for path in paths)
    skipped = [what for what, _ in source.skipped]
    for path in everything_below(root):
        named = shown(path) in skipped or any(
            what.endswith("/") and f"{shown(path)}/".startswith(what) for what in skipped
        )
        if os.path.isdir(root / path):  # a link, whose folder was read by this way or is named
            inside = [*paths, *skipped, *(what for what in skipped if what.endswith("/"))]
            assert named or any(p.startswith(f"{path}/") for p in inside), (path, skipped)
        else:
            assert named + (path in paths) == 1, (path, skipped, paths)
    for i, path in enumerate(paths):
        assert source.classes[source.labels[i]] == class_of(path, own_splits)
        if (root / path).exists():
            assert source.read(i) == (root / path).read_bytes()
    # No folder twice, by whatever way.
    folders = {os.path.dirname(path) for path in paths}
    assert len({os.path.realpath(root / folder) for folder in folders}) == len(folders)
    return source


def check_shards_of(root: Path, source: Any, dest: Path) -> None:
    """Written and read back: pixels and labels of each sample, or its key in skipped.txt."""
    try:
        report = shard(str(root), dest, progress=False)
    except UserError as error:
        if "no image of the source could be read" in str(error):
            return
        raise
    lost = dict(report.skipped)
    seen = {}
    for split in report.samples:
        index = open_index(dest / split)
        for i, key in enumerate(index.keys()):
            path = dest / split / index.shards[index.shard[i]].name
            with path.open("rb") as file:
                file.seek(int(index.offset[i]))
                seen[key] = (file.read(int(index.size[i])), index.classes[index.label[i]])
    for i, key in enumerate(source.keys):
        assert (key in seen) != (key in lost)
        if key in seen:
            data, name = seen[key]
            assert name == source.classes[source.labels[i]]
            with (
                Image.open(io.BytesIO(data)) as one,
                Image.open(root / source.read.paths[i]) as two,
            ):
                np.testing.assert_array_equal(one, two)
    lines = (dest / "skipped.txt").read_text().splitlines() if lost else []
    assert len(lines) == len(report.skipped)


@pytest.mark.parametrize(
    ("trees", "written"),
    [(20, 2), pytest.param(1000, 20, marks=pytest.mark.slow)],
)
def test_folders(scratch: Path, trees: int, written: int) -> None:
    accepted = 0
    for seed in range(trees):
        root = scratch / "alone" / "tree"
        plant(root, random.Random(seed))
        source = check_folder(root)
        accepted += source is not None
        if source is not None and seed % (trees // written) == 0:
            check_shards_of(root, source, scratch / f"shards{seed}")
        shutil.rmtree(root)
    assert accepted > trees * 0.6


# ---------------------------------------------------------------- archives

PARTS = ["jpg", "JPG", "png", "gif", "input.jpg", "seg.png", "cls", "cls", "CLS", "json", "txt"]
PARTS += ["input.cls", "heic", "2.cls", "", "jpeg"]


def pack(path: Path, rng: random.Random) -> None:
    """A random archive, mostly of whole samples, by one of several writers."""
    files: list[tuple[str, bytes, str]] = []  # name, data, what it is
    for number in range(rng.randint(1, 7)):
        key = rng.choice(["", "", "./", "d/", "d.x/", "__a__/"]) + rng.choice(["k{}", "k", ".k{}"])
        key = key.format(number)
        parts = ["jpg", "cls"] if rng.random() < 0.8 else rng.sample(PARTS, rng.randint(1, 4))
        if rng.random() < 0.1:
            parts.append("json")
        for part in parts:
            name = f"{key}.{part}" if rng.random() < 0.97 else key
            files.append((name, content(part, number, rng), "file"))
    for _ in range(rng.randint(0, 3)):
        add_oddity(files, rng)
    write(path, files, rng)


def content(part: str, number: int, rng: random.Random) -> bytes:
    last = part.lower().rpartition(".")[2]
    if last == "cls":
        if rng.random() < 0.8:
            return b"%d" % (number % 3)
        return rng.choice([b"0", b"1", b"2", b" 1\n", b"007", b"1_0", b"cat", b"-1", b""])
    if last == "json":
        label: Any = rng.choice([0, 1, 2, "ant", None, -1, True, 1.5])
        return rng.choice([json.dumps({"label": label}).encode(), b"{", b"[1]", b'{"a": 1}'])
    return f"{number} {part} ".encode() * rng.randint(1, 200)


def add_oddity(files: list[tuple[str, bytes, str]], rng: random.Random) -> None:
    place = rng.randrange(len(files) + 1)
    target = rng.choice(files)[0]
    stem = target.rpartition(".")[0] or target
    kind = rng.randrange(6)
    if kind == 0:  # a duplicate name, or the parts of a sample apart
        files.insert(place, files.pop(rng.randrange(len(files))))
    elif kind == 1:
        files.insert(place, rng.choice(files))
    elif kind == 2:
        part = rng.choice(["cls", "jpg", "txt"])
        files.insert(place, (f"{stem}{rng.choice(['', 'l'])}.{part}", target.encode(), "hard"))
    elif kind == 3:
        goal = rng.choice([os.path.basename(target), "nowhere.cls", "/abs.jpg"])
        files.insert(place, (f"{stem}s.{rng.choice(['cls', 'jpg'])}", goal.encode(), "symbolic"))
    elif kind == 4:
        files.insert(place, (stem + "dir", b"", "folder"))
    else:
        files.insert(place, ("__meta__", b"x", "file"))


TYPES = {
    "hard": tarfile.LNKTYPE,
    "symbolic": tarfile.SYMTYPE,
    "folder": tarfile.DIRTYPE,
    "file": tarfile.REGTYPE,
}


def write(path: Path, files: list[tuple[str, bytes, str]], rng: random.Random) -> None:
    plain = all(kind == "file" for _, _, kind in files)
    if plain and rng.random() < 0.3:
        with path.open("wb") as out:
            for name, data, _ in files:
                write_member(out, name, data)
            write_end(out)
        return
    style = rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(path, "w", format=style) as tar:
        for name, data, kind in files:
            info = tarfile.TarInfo(name)
            info.type = TYPES[kind]
            if kind in ("hard", "symbolic"):
                info.linkname, data = data.decode(), b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def groups_in(path: Path) -> Iterator[tuple[str, list[tuple[str, tarfile.TarInfo]]]]:
    """Members as WebDataset groups them, with links among them, and without hidden ones."""
    with tarfile.open(path) as tar:
        found = [(m, *base_plus_ext(m.name)) for m in tar if not m.isdir()]
    known = [
        (m, key, extension.lower())
        for m, key, extension in found
        if key and not m.name.startswith("__a__/") and os.path.basename(m.name)[0] != "."
    ]
    for key, group in itertools.groupby(known, lambda item: item[1]):
        yield key, [(extension, m) for m, _, extension in group]


def check_archive(path: Path) -> None:
    """Each member is of a sample, of a named problem, or counted."""
    scan = scan_shard(path)
    data = path.read_bytes()
    samples = {
        key: (data[o : o + n], label)
        for key, o, n, label in zip(scan.keys, scan.offsets, scan.sizes, scan.labels, strict=True)
    }
    for crc, (image, _) in zip(scan.crcs, samples.values(), strict=False):
        assert len(samples) < len(scan.keys) or crc == crc32c(image)
    named = " ".join(reason for _, reason in scan.problems)
    counted = Counter[str]()
    keys = []
    for key, group in groups_in(path):
        keys.append(key)
        extensions = [extension for extension, _ in group]
        if f"sample {key!r}" in named:
            counted["problem"] += len(group)
            continue
        images = [e for e in extensions if e.rpartition(".")[2] in IMAGE_EXTENSIONS]
        if key not in samples or not images:
            # Neither an image nor a label that could be one is passed over without a name.
            assert not images, (key, extensions, scan)
            assert not any(e.rpartition(".")[2] == "cls" for e in extensions), (key, scan)
            continue
        plain = [e for e in images if "." not in e]
        image = plain[0] if plain else images[0]
        assert len(plain) <= 1
        assert plain or len(images) == 1
        prefix = image.rpartition(".")[0]
        names = {name: prefix + "." + name if prefix else name for name in ("cls", "json")}
        used = sum(name in extensions or names[name] in extensions for name in ("cls", "json"))
        counted["sample"] += 1 + used
    with tarfile.open(path) as tar:
        members = sum(not m.isdir() for m in tar)
    total = counted.total() + scan.passed_over.total()
    assert total >= members, (counted, scan)
    # A key that occurs again may be named for one of its groups and counted for another.
    assert total == members or len(keys) > len(set(keys)), (counted, scan)
    # Of two samples of one key the second is refused later, by the index.
    once = {key: sample for key, sample in samples.items() if scan.keys.count(key) == 1}
    check_against_webdataset(path, once, set(scan.keys), named)


def check_against_webdataset(
    path: Path, samples: dict[str, Any], keys: set[str], named: str
) -> None:
    """What both read is the same; what webdataset reads as one image and a number, we read."""
    with path.open("rb") as stream:
        files = tar_file_expander(iter([{"url": str(path), "stream": stream}]))
        theirs = list(group_by_keys(files, handler=lambda error: True))
    often = Counter(group["__key__"] for group in theirs)
    for group in theirs:
        key = group["__key__"]
        images = [e for e in group if e in IMAGE_EXTENSIONS]
        if often[key] > 1 or f"sample {key!r}" in named or len(images) != 1 or key.endswith("/"):
            continue
        if key in samples:
            image, label = samples[key]
            assert image == group[images[0]]
            if "cls" in group:
                assert label == int(group["cls"])
        elif key not in keys:
            assert "cls" not in group, (key, group, samples, named)


@pytest.mark.parametrize(
    ("trees", "indexed"),
    [(40, 4), pytest.param(1200, 40, marks=pytest.mark.slow)],
)
def test_archives(scratch: Path, trees: int, indexed: int) -> None:
    accepted = 0
    for seed in range(trees):
        folder = scratch / "tars"
        folder.mkdir()
        rng = random.Random(seed)
        for number in range(rng.randint(1, 2)):
            pack(folder / f"{number}.tar", rng)
            check_archive(folder / f"{number}.tar")
        accepted += bool(scan_shard(folder / "0.tar").keys)
        if seed % (trees // indexed) == 0:
            check_index(folder)
        shutil.rmtree(folder)
    assert accepted > trees * 0.6


def check_index(folder: Path) -> None:
    """As an index, and as a source of shards: the same samples, the same problems."""
    scans = [scan_shard(path) for path in sorted(folder.glob("*.tar"))]
    keys = [key for scan in scans for key in scan.keys]
    problems = [f"{where}: {what}" for scan in scans for where, what in scan.problems]
    try:
        source = open_source(str(folder))
    except UserError as error:
        if keys or not all(problem in str(error) for problem in problems[:1]):
            raise
        return
    assert set(source.keys) == set(keys)
    assert {f"{where}: {what}" for where, what in source.skipped} >= set(problems)
    twice = len(keys) - len(set(keys))
    if problems or twice:
        with pytest.raises(UserError, match="was not indexed"):
            build_index(folder)
    index = build_index(folder, skip_bad=True)
    assert index.keys() == source.keys
    assert index.label.tolist() == source.labels.tolist()
    assert len(index.problems) == len(problems) + twice
    total = sum(scan.passed_over.total() for scan in scans)
    assert sum(index.passed_over.values()) == total
