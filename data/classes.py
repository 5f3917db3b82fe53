"""The names of classes: classes.txt beside shards."""

from pathlib import Path

from bigbatch.configs.errors import UserError

# The one class of samples that have targets and no label.
UNLABELLED: tuple[str, ...] = ("unlabelled",)


def read_classes(root: Path) -> tuple[str, ...] | None:
    """Class names, one a line, from classes.txt in `root` or the folder above it."""
    for path in (root / "classes.txt", root.resolve().parent / "classes.txt"):
        if path.is_file():
            return parse_classes(path.read_bytes(), path)
    return None


def parse_classes(text: bytes, path: Path | str) -> tuple[str, ...]:
    """The lines of a classes.txt, by whatever editor, in UTF-8; UserError for other bytes."""
    try:
        lines = text.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); write it as UTF-8") from None
    return tuple(lines.rstrip("\n").split("\n"))
