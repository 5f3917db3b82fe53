"""From the members of an archive to samples: which are the image and the label, and what is lost.

As in WebDataset, consecutive members whose names agree up to the first dot of the file name
form a sample, and what comes behind that dot is the member's extension, in lower case.
"""

import posixpath
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from google_crc32c import value as crc32c

from bigbatch.configs.json_text import parse_json
from bigbatch.data.tar import Member, TarError, members
from bigbatch.data.targets import EXTENSIONS as TARGETS
from bigbatch.data.targets import encode_target, target_numbers

# What may be decoded as an image, by extension; nothing is ever unpickled.
_JPEG_AND_PNG = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng")
IMAGE_EXTENSIONS = frozenset(
    (*_JPEG_AND_PNG, "webp", "gif", "avif", "bmp", "ppm", "pgm", "pbm", "pnm", "tif", "tiff")
)
META = re.compile(r"__[^/]*__($|/)")  # names that are no samples, to WebDataset
_LABELS = ("cls", "json", *TARGETS)
_MAX_IMAGE_BYTES = 1 << 30
_MAX_LABEL_BYTES = 1 << 20
_MAX_LINKS = 40  # from one link to the next, as in Linux


_Bytes = bytes  # a scan has a field of that name


@dataclass
class Scan:
    """The samples of one archive, column by column, and what is wrong with it.

    `problems` are (place, reason); `passed_over` counts the members that are no part of a
    sample, by what they are.
    """

    bytes: int = 0
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    targets: list[_Bytes] = field(default_factory=list)  # float32 numbers, b"" where there are none
    problems: list[tuple[str, str]] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)


def scan_shard(
    path: Path,
    label_key: str | None = None,
    unlabelled: bool = False,
    target_key: str | None = None,
) -> Scan:
    """Find the labelled images of one WebDataset archive; with `unlabelled` also the others.

    A sample's image is KEY.jpg, or another of IMAGE_EXTENSIONS, or else the only member such
    as KEY.input.jpg. Its label is read by `class_number` from KEY.cls and KEY.json (of
    KEY.input.jpg also from KEY.input.cls), and -1 where that is none, with `unlabelled`, or
    where the sample has a target. That is KEY.target.json or KEY.target.npy, or the entry
    `target_key` of KEY.json. Links are followed inside the archive. A sample with neither image nor
    label is passed over, and counted. Problems are listed, with the archive and the offset; nothing
    raises but OSError.
    """
    scan = Scan(bytes=path.stat().st_size)
    with path.open("rb", buffering=1 << 20) as file:
        reader = _Reader(scan, path.name, file, label_key, unlabelled, target_key)
        try:
            for member in members(file, scan.bytes):
                folder, slash, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                odd = not stem or not dot or member.name.startswith("__")
                if odd and reader.passes_over(member.name, base):
                    continue
                key = folder + slash + stem
                if key != reader.sample.key:
                    reader.close()
                    reader.sample = _Sample(key, member.offset)
                reader.add(extension.lower(), member)
        except TarError as error:
            scan.problems.append((f"{path.name} at byte {error.offset:,}", error.reason))
        reader.close()
        reader.join_strays()
    return scan


def class_number(cls: bytes | None, record: bytes | None, key: str | None = None) -> int | None:
    """The label of a sample, from the bytes of its KEY.cls and of its KEY.json; None without.

    KEY.cls counts first: decimal digits. Without one, the number `label` in KEY.json does. If
    both give a number, they must agree; a text in KEY.json says nothing against KEY.cls. If
    `key` is given, that entry of KEY.json is the label, and KEY.cls does not count. Raises
    ValueError, which says what is wrong.
    """
    found = None
    if cls is not None and key is None:
        digits = cls.strip()
        if not digits.isdigit() or len(digits) > 10:  # int() would take 1_0 for 10
            raise ValueError(f"has no class number in .cls ({cls[:40]!r})")
        found = int(digits)
    said = None if record is None else _entry(record, key or "label")
    number = said if isinstance(said, int) and not isinstance(said, bool) and said >= 0 else None
    if found is None and said is not None:
        if number is None:
            raise ValueError(f"has no class number in .json ({key or 'label'}: {said!r:.40})")
        found = number
    elif number is not None and number != found:
        raise ValueError(f"has label {found} in .cls and {number} in .json")
    if found is not None and found >= 1 << 31:
        raise ValueError(f"has label {found}; the limit is {(1 << 31) - 1}")
    return found


def _entry(record: bytes, key: str) -> object:
    try:
        entries = parse_json(record)
    except ValueError:
        return None
    return entries.get(key) if isinstance(entries, dict) else None


class _Sample:
    __slots__ = ("crc", "image", "key", "labels", "offset", "others", "problem")

    def __init__(self, key: str, offset: int = 0) -> None:
        self.key, self.offset = key, offset
        self.image: Member | None = None
        self.crc = 0
        self.labels: dict[str, bytes] = {}  # and targets; by extension, of _LABELS
        self.problem = ""
        self.others: list[tuple[str, Member]] = []  # of other extensions, and links


@dataclass
class _Reader:
    scan: Scan
    shard: str
    file: BinaryIO
    label_key: str | None
    takes_unlabelled: bool = False
    target_key: str | None = None
    sample: _Sample = field(default_factory=lambda: _Sample(""))
    targets: dict[str, Member | None] | None = None
    # Places in scan.problems of images without a label and labels without an image, by key.
    unlabelled: dict[str, int] = field(default_factory=dict)
    imageless: dict[str, int] = field(default_factory=dict)

    def passes_over(self, name: str, base: str) -> bool:
        """Whether WebDataset takes a name for no part of a sample; if so, it is counted."""
        if META.match(name):
            self.scan.passed_over["__NAME__"] += 1
        elif base.startswith("."):
            self.scan.passed_over["hidden"] += 1
        elif "." not in base:
            self.scan.passed_over["without extension"] += bool(base)  # v7's folders end in /
        else:
            return False
        return True

    def add(self, extension: str, member: Member) -> None:
        sample = self.sample
        if member.link is not None:
            sample.others.append((extension, member))
        elif extension in IMAGE_EXTENSIONS:
            if sample.image is not None:
                sample.problem = "has two images"
            elif member.size > _MAX_IMAGE_BYTES:
                sample.image, sample.problem = member, f"has an image of {member.size:,} bytes"
            else:
                sample.image, sample.crc = member, crc32c(self.file.read(member.size))
        elif extension in _LABELS:
            if extension in sample.labels:
                sample.problem = f"has two .{extension}"
            elif member.size > _MAX_LABEL_BYTES:
                sample.problem = f"has a .{extension} of {member.size:,} bytes"
            else:
                sample.labels[extension] = self.file.read(member.size)
        else:
            sample.others.append((extension, member))

    def close(self) -> None:
        """Note the sample that has come to its end, or what is wrong with it."""
        sample = self.sample
        if sample.others:
            self._settle(sample)
        image, label, wrong, numbers = sample.image, None, "", b""
        try:
            cls, record = sample.labels.get("cls"), sample.labels.get("json")
            label = class_number(cls, record, self.label_key)
            numbers = b"" if self.takes_unlabelled else self._target(sample)
        except ValueError as error:
            label, wrong = None, str(error)
        if image is None:
            self._close_without_image(sample, label)
            return
        if label is None and self.takes_unlabelled and not sample.problem:
            label = -1
            self.scan.passed_over["labels that are none"] += bool(wrong)
        elif label is None and numbers:
            label = -1  # maybe none has one: the index tells
        if label is None or sample.problem:
            if not sample.problem and not wrong:
                self.unlabelled[sample.key] = len(self.scan.problems)
                wanted = f".json with `{self.label_key or 'label'}`"
                wrong = f"has no label ({'' if self.label_key else '.cls, or '}{wanted})"
            self._problem(image.offset, sample.problem or wrong)
            return
        scan = self.scan
        scan.keys.append(sample.key)
        scan.offsets.append(image.offset)
        scan.sizes.append(image.size)
        scan.labels.append(label)
        scan.crcs.append(sample.crc)
        scan.targets.append(numbers)
        for extension, _ in sample.others:
            scan.passed_over[f".{_last(extension)}"] += 1

    def _target(self, sample: _Sample) -> bytes:
        """The numbers of a sample's target. Raises ValueError."""
        key = self.target_key
        if key is None:
            return target_numbers(sample.labels)
        said = _entry(sample.labels.get("json", b""), key)
        if said is None:
            raise ValueError(f"has no target (.json with `{key}`)")
        try:
            return encode_target(said)
        except ValueError as error:
            raise ValueError(f"has no target in .json ({key}: {error})") from None

    def _close_without_image(self, sample: _Sample, label: int | None) -> None:
        extensions = [*sample.labels, *(extension for extension, _ in sample.others)]
        if sample.problem:
            self._problem(sample.offset, sample.problem)
        elif label is not None or any(_last(e) == "cls" or e in TARGETS for e in extensions):
            self.imageless[sample.key] = len(self.scan.problems)
            what = "target" if label is None and "cls" not in extensions else "label"
            self._problem(sample.offset, f"has a {what} and no image (only {_list(extensions)})")
        else:
            for extension in extensions:
                self.scan.passed_over[f".{_last(extension)}"] += 1

    def _problem(self, offset: int, reason: str) -> None:
        place = f"{self.shard} at byte {offset:,}"
        self.scan.problems.append((place, f"sample {self.sample.key!r} {reason}"))

    def _settle(self, sample: _Sample) -> None:
        """Find image and label among the links and the longer extensions; count the others."""
        position = self.file.tell()  # of the next sample, whose first member waits there
        others, sample.others = sample.others, []
        for extension, member in others:
            if member.link is None:
                sample.others.append((extension, member))
                continue
            found = self._follow(member)
            if found is not None:
                self._take(extension, found)
            elif _last(extension) in IMAGE_EXTENSIONS or _last(extension) in _LABELS:
                sample.problem = (
                    f"has a link .{extension} to {member.link!r}, which is no file of the archive"
                )
            else:
                sample.others.append((extension, member))
        images = [(e, m) for e, m in sample.others if _last(e) in IMAGE_EXTENSIONS]
        if sample.image is None and len(images) == 1:
            extension, image = images[0]
            sample.others.remove(images[0])
            self._take(_last(extension), image)
            for name in _LABELS:  # KEY.input.cls beside KEY.input.jpg
                own = f"{extension.rpartition('.')[0]}.{name}"
                mine = [(e, m) for e, m in sample.others if e == own]
                if name not in sample.labels and len(mine) == 1:
                    sample.others.remove(mine[0])
                    self._take(name, mine[0][1])
        elif sample.image is None and images:
            sample.problem = (
                f"has {len(images)} images ({_list([e for e, _ in images])}); a key ends at the "
                "first dot of the file name, so give each image its own, without a dot"
            )
        elif labels := {e.removesuffix("cls") for e, _ in sample.others if _last(e) == "cls"}:
            theirs = [e for e, _ in images if e.removesuffix(_last(e)) in labels]
            if theirs:  # p.1.jpg with p.1.cls beside p.jpg, and no mask such as p.seg.png
                sample.problem = (
                    f"has a label of another image (of .{theirs[0]}); a key ends at the first dot "
                    "of the file name, so give each image its own, without a dot"
                )
        self.file.seek(position)

    def _take(self, extension: str, member: Member) -> None:
        """Add a member that is not the one just read."""
        self.file.seek(member.offset)
        self.add(extension, member)

    def _follow(self, member: Member) -> Member | None:
        """The file that a link points at, if it is one of the archive's, and the only one."""
        if self.targets is None:
            self.targets = {}
            try:
                for each in members(self.file, self.scan.bytes):
                    name = posixpath.normpath(each.name)
                    self.targets[name] = None if name in self.targets else each
            except TarError:
                pass  # the scan meets it as well
        found: Member | None = member
        for _ in range(_MAX_LINKS):
            if found is None or found.link is None:
                return found
            found = self.targets.get(posixpath.normpath(found.link))
        return None

    def join_strays(self) -> None:
        """Say it once where images and labels of the same keys lie apart."""
        problems = self.scan.problems
        apart = self.unlabelled.keys() & self.imageless.keys()
        for key in apart:
            place, _ = problems[self.unlabelled[key]]
            problems[self.unlabelled[key]] = (
                place,
                f"sample {key!r} has its label elsewhere in the archive; labels must stand beside "
                "their images: sort the members by name (tar --sort=name)",
            )
        gone = {self.imageless[key] for key in apart}
        self.scan.problems = [p for i, p in enumerate(problems) if i not in gone]


def _last(extension: str) -> str:
    return extension.rpartition(".")[2]


def _list(extensions: list[str]) -> str:
    shown = ", ".join(f".{e}" for e in extensions[:3])
    return shown + (", ..." if len(extensions) > 3 else "")
