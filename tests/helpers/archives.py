"""Small archives, written as bigbatch writes them."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from bigbatch.data.tar import write_end, write_member


def pack(path: Path, *files: tuple[str, bytes]) -> Path:
    """A tar of (name, data), in this order; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for name, data in files:
            write_member(file, name, data)
        write_end(file)
    return path


def rewrite(shard: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Write a shard anew, one member of it changed."""
    with tarfile.open(shard) as old:
        members = [(m, old.extractfile(m).read()) for m in old.getmembers()]  # type: ignore[union-attr]
    assert name in {member.name for member, _ in members}
    with tarfile.open(shard, "w") as new:
        for member, content in members:
            data = change(content) if member.name == name else content
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))


def alter(shard: Path, key: str, place: tuple[int, int] = (0, 0)) -> None:
    """Change one pixel of one picture of gray, in a shard that is written anew."""

    def change(content: bytes) -> bytes:
        picture = Image.open(io.BytesIO(content))
        picture.putpixel(place, 255 - int(picture.getpixel(place)))  # type: ignore[arg-type]
        picture.save(buffer := io.BytesIO(), "PNG")
        return buffer.getvalue()

    rewrite(shard, f"{key}.png", change)
