"""Files that a reader always finds whole: written through a temporary one, strict JSON."""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bigbatch.configs.errors import UserError
from bigbatch.configs.json_text import parse_json

_BLOCK = 1 << 20
_LONGEST_LINE = 1 << 24


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write through a temporary file, so that a reader sees the old content or the new one.

    Raises OSError, which names the file; what was there is then as it was.
    """
    try:
        with appearing(path) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        error.filename = str(path)  # the kernel names no file where a write fails
        raise


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` as the block ends, whole, and on the
    disk; after an error in it nothing has changed."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def append_whole(handle: int, lines: bytes) -> None:
    """Append to a file that is open for it, all or nothing: raises OSError where it is nothing."""
    size = os.fstat(handle).st_size
    if os.write(handle, lines) < len(lines):
        os.ftruncate(handle, size)  # no torn line is ever left
        raise OSError("no space for another line")


def check_writable(path: Path) -> None:
    """Raise UserError where no file or folder could be made at `path`, before work is done for it.

    Folders above it that are missing could be made too. Nothing is written.
    """
    whole = path.absolute()
    there = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
    if not there.is_dir():
        raise UserError(f"--out {path}: {there} is no folder; choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {path}: {there} may not be written to; choose another --out")


def sync(path: Path) -> None:
    """Put a file's bytes, or a folder's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(
    value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None
) -> str:
    """Plain values as strict JSON (RFC 8259): NaN and infinity, which it lacks, become null."""
    try:
        return json.dumps(value, indent=indent, default=default, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), indent=indent, default=default, allow_nan=False)


def finite(value: Any) -> Any:
    """A tree of plain values with None in place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where the file is missing, or is no object."""
    try:
        see_that_it_ends(path)
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def see_that_it_ends(path: Path) -> None:
    """Raise OSError where a path is a pipe or a device, of which a reader may wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no file", str(path))


def read_jsonl(path: Path, *words: bytes) -> list[dict[str, Any]]:
    """All that `iter_jsonl` finds, where that is little."""
    return list(iter_jsonl(path, *words))


def iter_jsonl(path: Path, *words: bytes, newest_first: bool = False) -> Iterator[dict[str, Any]]:
    """The whole records of a JSON-lines file, in memory that does not grow with the file.

    A line cut short, or no record, is left out. With `words`, only lines that hold one of them
    are parsed, which costs a fraction: who asks still looks at the record.
    """
    for line in iter_lines(path, *words, newest_first=newest_first):
        try:
            record = parse_json(line)
        except ValueError:
            continue  # torn by a power cut; the next attempt writes that step again
        if isinstance(record, dict):
            yield record


def iter_lines(path: Path, *words: bytes, newest_first: bool = False) -> Iterator[bytes]:
    """The lines of a file that end, without their ends; with `words`, those that hold one of them.

    A line of more than 16 MB, which no record is, is stepped over. Raises OSError where the path
    is no file.
    """
    see_that_it_ends(path)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for block in _blocks_backwards(file) if newest_first else _blocks(file):
            if words and not any(word in block for word in words):
                continue
            lines = block.split(b"\n")[:-1]
            for line in reversed(lines) if newest_first else lines:
                if not words or any(word in line for word in words):
                    yield line


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """A file in blocks of whole lines, oldest first."""
    rest, too_long = b"", False
    while block := file.read(_BLOCK):
        end = block.rfind(b"\n") + 1
        if end:
            start = block.find(b"\n") + 1 if too_long else 0
            yield rest + block[start:end]
            rest, too_long = block[end:], False
        elif not too_long:
            rest += block
            too_long = len(rest) > _LONGEST_LINE
            rest = b"" if too_long else rest


def _blocks_backwards(file: BinaryIO) -> Iterator[bytes]:
    """The same blocks, newest first."""
    at = file.seek(0, os.SEEK_END)
    rest, torn = b"", True  # a last line without its end is none
    while at > 0:
        start = max(0, at - _BLOCK)
        file.seek(start)
        block, at = file.read(at - start), start
        if torn:
            block = block[: block.rfind(b"\n") + 1]
            torn = not block
        block += rest
        # Where the first line of a block begins is seen in the block before it.
        first = block.find(b"\n") + 1 if start else 0
        if start and first == len(block):
            rest, torn = (b"", True) if len(block) > _LONGEST_LINE else (block, torn)
            continue
        rest = block[:first]
        yield block[first:]
