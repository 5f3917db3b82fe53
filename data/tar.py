"""Tar archives as WebDataset uses them: reading that notices damage, and writing.

Python's tarfile takes an invalid header in the middle for the end of the archive and loses
the rest without a word; this reader names the place. It is also several times faster
(benchmarks/index.py). Formats: ustar and pax (POSIX.1-2001), GNU long names, v7.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from google_crc32c import value as crc32c

BLOCK = 512
_ZEROS = bytes(BLOCK)
# What may be decoded as an image, by extension; nothing is ever unpickled.
IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff"))
_MAX_IMAGE_BYTES = 1 << 30
_MAX_LABEL_BYTES = 1 << 20
_MAX_EXTENDED_HEADER = 1 << 20


class Member(NamedTuple):
    """A regular file in an archive: its data are the bytes [offset, offset + size)."""

    name: str
    offset: int
    size: int


class TarError(ValueError):
    """Damage in an archive, at a byte offset."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"at byte {offset:,}: {reason}")


def members(file: BinaryIO, file_size: int) -> Iterator[Member]:
    """The regular files of an archive, in order.

    While it waits at a member, `file` stands at the member's data. Raises TarError at the
    first damage, after all members before it: an invalid header, a member that reaches
    beyond the end of file, data behind the end mark, or no end mark (two zero blocks).
    """
    position, header = 0, 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if len(block) < BLOCK or block == _ZEROS:
            break
        kind, size = _check(block, position)
        if long_name is None and long_size is None:
            header = position
        offset = position + BLOCK
        if kind not in b"xgLK" and long_size is not None:
            size = long_size
        position = offset + -(-size // BLOCK) * BLOCK
        if position > file_size:
            raise TarError(
                header, f"a member of {size:,} bytes reaches beyond the end of file ({file_size:,})"
            )
        if kind in b"xgLK":
            if size > _MAX_EXTENDED_HEADER:
                raise TarError(header, f"an extended header of {size:,} bytes is not plausible")
            text = file.read(size)
            if kind == b"L":
                long_name = _text(text)
            elif kind == b"x":
                records = _pax(text, offset)
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if "size" in records else long_size
            continue
        if kind in b"0\x007":
            yield Member(long_name or _name(block), offset, size)
        elif kind not in b"5126":  # folders, links, and pipes hold no data and no samples
            raise TarError(header, f"member type {kind!r} (such as a sparse file) is not supported")
        long_name = long_size = None
    _check_end(file, position, block)


def _check(block: bytes, position: int) -> tuple[bytes, int]:
    """Type and size from a header block whose checksum is right."""
    try:
        expected = int(block[148:156].strip(b" \0") or b"-", 8)
        size = _number(block[124:136])
    except ValueError:
        expected, size = -1, -1
    # The checksum counts its own field as eight spaces.
    actual = sum(block) - sum(block[148:156]) + 8 * 32
    if actual != expected or size < 0:
        raise TarError(position, "invalid header; what follows it cannot be trusted")
    return block[156:157], size


def _number(digits: bytes) -> int:
    """A header number: octal text, or base 256 where the first bit is set (GNU)."""
    if digits[0] & 0x80:
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
    return int(digits.strip(b" \0") or b"0", 8)


def _name(block: bytes) -> str:
    name = _text(block[:100])
    prefix = block[345:500]
    # GNU's own format has other things where ustar has the prefix; its magic ends in a space.
    if block[257:263] == b"ustar\0" and prefix[0]:
        return f"{_text(prefix)}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _pax(text: bytes, offset: int) -> dict[str, str]:
    """Records of the form "LENGTH KEY=VALUE\\n"."""
    records = {}
    while text.strip(b"\0"):
        match = re.match(rb"(\d{1,7}) ([^=]+)=", text)
        record = text[: int(match[1])] if match else b""
        if match is None or not record.endswith(b"\n"):
            raise TarError(offset, "invalid extended header")
        value = record[match.end() : -1]
        records[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        text = text[len(record) :]
    if not records.get("size", "0").isdigit():
        raise TarError(offset, "invalid size in an extended header")
    return records


def _check_end(file: BinaryIO, position: int, block: bytes) -> None:
    second = file.read(BLOCK)
    if block != _ZEROS or second != _ZEROS:
        if len(block) == len(second) == BLOCK:
            raise TarError(position, "an empty block stands between members")
        raise TarError(position, "the file ends without the end mark (two empty blocks)")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise TarError(position, "data follow the end mark; were two archives joined?")


@dataclass
class Scan:
    """The samples of one archive, column by column, and what is wrong with it."""

    bytes: int = 0
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def scan_shard(path: Path) -> Scan:
    """Find the labelled images of one WebDataset archive.

    As in WebDataset, consecutive members with the same name up to the first dot of the file
    name form a sample. Its image is the member with an extension of IMAGE_EXTENSIONS; its
    label is the integer in KEY.cls, or `label` in KEY.json. Samples that have no image are
    passed over. Problems are listed, with the archive and the offset; nothing raises but
    OSError.
    """
    scan = Scan(bytes=path.stat().st_size)
    sample = _Sample("")
    with path.open("rb", buffering=1 << 20) as file:
        try:
            for member in members(file, scan.bytes):
                folder, slash, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if not stem or not extension:
                    continue
                key = folder + slash + stem
                if key != sample.key:
                    _close(scan, sample, path.name)
                    sample = _Sample(key)
                sample.add(extension.lower(), member, file)
        except TarError as error:
            scan.problems.append(f"{path.name} {error}")
    _close(scan, sample, path.name)
    return scan


@dataclass
class _Sample:
    key: str
    image: Member | None = None
    crc: int = 0
    label: int | None = None
    problem: str = ""

    def add(self, extension: str, member: Member, file: BinaryIO) -> None:
        if extension in IMAGE_EXTENSIONS:
            if self.image is not None:
                self.problem = "has two images"
            elif member.size > _MAX_IMAGE_BYTES:
                self.image, self.problem = member, f"has an image of {member.size:,} bytes"
            else:
                self.image, self.crc = member, crc32c(file.read(member.size))
        elif extension in ("cls", "json") and member.size <= _MAX_LABEL_BYTES:
            text = file.read(member.size)
            try:
                label = int(text) if extension == "cls" else json.loads(text).get("label")
            except (ValueError, AttributeError, RecursionError):
                label = None
            if isinstance(label, int) and 0 <= label < 1 << 31:
                self.label = label
            elif extension == "cls" or label is not None:
                self.problem = f"has no class number in .{extension} ({text[:40]!r})"


def _close(scan: Scan, sample: _Sample, shard: str) -> None:
    image, label, problem = sample.image, sample.label, sample.problem
    if image is None:
        return
    if label is None:
        problem = problem or "has no label (.cls, or .json with `label`)"
    if label is None or problem:
        scan.problems.append(f"{shard} at byte {image.offset:,}: sample {sample.key!r} {problem}")
        return
    scan.keys.append(sample.key)
    scan.offsets.append(image.offset)
    scan.sizes.append(image.size)
    scan.labels.append(label)
    scan.crcs.append(sample.crc)


def write_member(file: BinaryIO, name: str, data: bytes) -> None:
    """Append one file. Same name and data give the same bytes: no time, no owner."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.write(info.tobuf(tarfile.PAX_FORMAT))
    file.write(data)
    file.write(bytes(-len(data) % BLOCK))


def write_end(file: BinaryIO) -> None:
    """The end mark, then everything onto the disk."""
    file.write(_ZEROS * 2)
    file.flush()
    os.fsync(file.fileno())
