"""Files that a reader always finds whole: written through a temporary one, strict JSON."""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.json_text import parse_json


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write through a temporary file, so that a reader sees the old content or the new one.

    Raises OSError, which names the file; what was there is then as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # the kernel names no file where a write fails
        with suppress(OSError):
            temporary.unlink()
        raise


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


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole records of a JSON-lines file; a line cut short, or no record, is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            record = parse_json(line)
        except ValueError:
            continue  # torn by a power cut; the next attempt writes that step again
        if isinstance(record, dict):
            records.append(record)
    return records
