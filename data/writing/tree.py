"""The files below a folder, each once: hidden folders and symbolic links to what is read already
are passed over, and named."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from bigbatch.configs.errors import UserError
from bigbatch.data.writing.sources import printable

# What systems and tools put beside files: thumbnails, bins, resource forks.
_NOT_THE_USERS = {"@eaDir", "__MACOSX", "#recycle", "@Recycle", "$RECYCLE.BIN", "lost+found"}


@dataclass
class Tree:
    """Paths of files and folders relative to `root`, / between names; and what was passed over."""

    root: Path
    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def passes_over(self, what: str, why: str) -> None:
        self.skipped.append((printable(what), why))


def walk(root: Path) -> Tree:
    """All files at or below `root`. Links are followed, but no folder is read twice.

    A folder itself goes before links to it, so that it does not matter in which order a link
    and its target are met. Raises UserError where a folder cannot be read.
    """
    tree = Tree(root)
    above = {_identity(folder) for folder in root.resolve().parents}
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        if folders:
            folder = folders.pop()
        else:
            links.sort(reverse=True)
            folder = links.pop()
        try:
            identity = _identity(root / folder)
            if identity in seen:
                tree.passes_over(f"{folder}/", "a link to a folder that is read already")
                continue
            if identity in above:  # it leads back here, and to whatever lies beside
                tree.passes_over(f"{folder}/", "a link to a folder above the source")
                continue
            seen.add(identity)
            tree.folders.append(folder)
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    _sort_in(tree, entry, f"{folder}/" if folder else "", folders, links)
        except OSError as error:
            raise UserError(
                f"cannot read {root / folder}: {error.strerror}; give a folder that can be read"
            ) from None
    tree.files.sort()
    tree.skipped.sort()
    return tree


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _sort_in(
    tree: Tree, entry: "os.DirEntry[str]", above: str, folders: list[str], links: list[str]
) -> None:
    path = above + entry.name
    hidden = entry.name.startswith(".") or entry.name in _NOT_THE_USERS
    if _is_folder(entry):
        if hidden:
            tree.passes_over(f"{path}/", "hidden folder")
        else:
            (links if entry.is_symlink() else folders).append(path)
    elif hidden:
        tree.passes_over(path, "hidden file")
    elif _is_special(entry):
        tree.passes_over(path, "neither a file nor a folder")  # reading a pipe would wait
    else:
        tree.files.append(path)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_special(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry exists and is no file; a broken link counts as a file, which is missing."""
    try:
        return not entry.is_file() and (not entry.is_symlink() or os.path.exists(entry.path))
    except OSError:
        return False
