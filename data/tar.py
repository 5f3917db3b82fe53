"""Tar archives as WebDataset uses them: reading that notices damage, and writing.

Python's tarfile takes an invalid header in the middle for the end of the archive and loses
the rest without a word; this reader names the place. It is also several times faster
(benchmarks/index.py). Formats: ustar and pax (POSIX.1-2001), GNU long names, v7.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import adler32

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTENDED_HEADER = 1 << 20
# How what is often called .tar, and is none, begins.
_NO_ARCHIVES = {
    b"\x1f\x8b": "gzip-compressed; decompress it, since training reads by offset",
    b"BZh": "bzip2-compressed; decompress it, since training reads by offset",
    b"\xfd7zXZ": "xz-compressed; decompress it, since training reads by offset",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; decompress it, since training reads by offset",
    b"version https://git-lfs": "a Git LFS pointer, not the archive; fetch it with `git lfs pull`",
}


class Member(NamedTuple):
    """A file in an archive: its data are the bytes [offset, offset + size).

    Of a hard or symbolic link, which has no data, `link` is the name that it points at: from
    the top of the archive, also where it was written relative to the link.
    """

    name: str
    offset: int
    size: int
    link: str | None = None


class TarError(ValueError):
    """Damage in an archive, at a byte offset."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"at byte {offset:,}: {reason}")
        self.offset, self.reason = offset, reason


def members(file: BinaryIO, file_size: int) -> Iterator[Member]:
    """The regular files and the links of an archive, in order.

    While it waits at a member, `file` stands at the member's data. Raises TarError at the
    first damage, after all members before it: an invalid header, a member that reaches
    beyond the end of file, data behind the end mark, or no end mark (two zero blocks).
    """
    position, header = 0, 0
    long_name: str | None = None
    long_link: str | None = None
    long_size: int | None = None
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if len(block) < BLOCK or block == _ZEROS:
            if position == 0:
                _refuse_other(block)  # a pointer of Git LFS is shorter than a header
            break
        kind, size = _check(block, position)
        if long_name is None and long_link is None and long_size is None:
            header = position
        offset = position + BLOCK
        if long_size is not None and kind not in b"xgLK":
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
            elif kind == b"K":
                long_link = _text(text)
            elif kind == b"x":
                records = _pax(text, offset)
                long_name = records.get("path", long_name)
                long_link = records.get("linkpath", long_link)
                long_size = int(records["size"]) if "size" in records else long_size
            continue
        if kind in b"0\x007":
            yield Member(long_name or _name(block), offset, size)
        elif kind in b"12":
            name, link = long_name or _name(block), long_link or _text(block[157:257])
            yield Member(name, offset, 0, _from_top(name, link) if kind == b"2" else link)
        elif kind not in b"3456VD":  # folders, devices, pipes, volume names hold no samples
            raise TarError(header, f"member type {kind!r} (such as a sparse file) is not supported")
        long_name = long_link = long_size = None
    _check_end(file, position, block)


def _from_top(name: str, link: str) -> str:
    """Where a symbolic link points, from the top of the archive as hard links do."""
    folder = name.rpartition("/")[0]
    return link if link.startswith("/") or not folder else f"{folder}/{link}"


def _check(block: bytes, position: int) -> tuple[bytes, int]:
    """Type and size from a header block whose checksum is right."""
    try:
        expected = int(block[148:156].strip(b" \0") or b"-", 8)
        size = _number(block[124:136])
    except ValueError:
        expected, size = -1, -1
    # The checksum counts its own field as eight spaces.
    actual = _sum(block[:256]) + _sum(block[256:]) - sum(block[148:156]) + 8 * 32
    if actual != expected or size < 0:
        if position == 0:
            _refuse_other(block)
        raise TarError(position, "invalid header; what follows it cannot be trusted")
    return block[156:157], size


def _refuse_other(block: bytes) -> None:
    """Raise TarError where what a file begins with says that it is no archive."""
    for start, what in _NO_ARCHIVES.items():
        if block.startswith(start):
            raise TarError(0, f"the file is {what}")


def _sum(half: bytes) -> int:
    """The sum of up to 256 bytes: the lower half of Adler-32, where its modulus has no part."""
    return (adler32(half) & 0xFFFF) - 1


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
    if any(key.startswith("GNU.sparse.") for key in records):
        raise TarError(offset, "a sparse file is not supported; store it whole")
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


def write_member(file: BinaryIO, name: str, data: bytes) -> None:
    """Append one file. Same name and data give the same bytes: no time, no owner."""
    file.write(_header(name, len(data)))
    file.write(data)
    file.write(bytes(-len(data) % BLOCK))


def _header(name: str, size: int) -> bytes:
    """As tarfile writes it in pax format. Where name and size fit into a ustar header, as most do,
    they are put into one made before: tarfile builds each anew, which takes ten times as long."""
    if len(name) > 100 or not name.isascii() or size >= 1 << 33:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.PAX_FORMAT)
    path, octal = name.encode(), b"%011o" % size
    checksum = b"%06o" % (_EMPTY_SUM + sum(path) + sum(octal))
    return (
        path.ljust(100, b"\0") + _EMPTY[100:124] + octal + _EMPTY[135:148] + checksum + _EMPTY[154:]
    )


_EMPTY = tarfile.TarInfo().tobuf(tarfile.PAX_FORMAT)  # a header without name and size
_EMPTY_SUM = int(_EMPTY[148:154], 8) - sum(_EMPTY[124:135])


def write_end(file: BinaryIO) -> None:
    """The end mark, then everything onto the disk."""
    file.write(_ZEROS * 2)
    file.flush()
    os.fsync(file.fileno())


def compressed(folder: Path) -> str:
    """What is to be said of compressed archives in a folder, which can not be read at any place."""
    kinds = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
    names = sorted(p.name for p in folder.iterdir() if p.name.lower().endswith(kinds))
    return f" ({names[0]!a:.60} is compressed: unpack it first)" if names else ""
