"""Small archives, written as bigbatch writes them."""

from pathlib import Path

from bigbatch.data.tar import write_end, write_member


def pack(path: Path, *files: tuple[str, bytes]) -> Path:
    """A tar of (name, data), in this order; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for name, data in files:
            write_member(file, name, data)
        write_end(file)
    return path
