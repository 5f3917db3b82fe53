"""Which kind of source a path is, and opening it."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from bigbatch.configs.errors import UserError
from bigbatch.configs.json_text import parse_json
from bigbatch.data.index import is_shard
from bigbatch.data.samples import IMAGE_EXTENSIONS
from bigbatch.data.writing.archives import tars
from bigbatch.data.writing.folders import begins_as_image, image_folder
from bigbatch.data.writing.sources import Source, digits
from bigbatch.data.writing.tables import parquet, saved_dataset
from bigbatch.data.writing.tree import Tree, walk

KINDS = ("images", "tars", "parquet", "dataset")
_SUFFIXES = {".parquet": "parquet", ".tar": "tars"}


def open_source(
    name: str,
    image_column: str | None = None,
    label_column: str | None = None,
    workers: int = 1,
    kind: str | None = None,
    target: str | None = None,
) -> Source:
    """`digits`, or a path: an image folder, Parquet, a saved dataset, or tars.

    `kind`, one of KINDS, says which of them to read where a folder holds several. Of tars,
    `label_column` is the entry of KEY.json that holds the label; `target` is the column, or the
    entry, of the numbers to learn. Raises UserError where it is
    none of these, several, or cannot be read.
    """
    path = Path(name)
    if name == "digits" and not path.exists():
        if target is not None:
            raise UserError(f"--target {target}: digits have labels alone; leave it out")
        return digits()
    if not path.exists():
        raise UserError(
            f"no source {name!r}; give `digits`, or the path of an image folder, of Parquet files, "
            "of a saved Hugging Face dataset, or of tars"
        )
    try:
        tree = walk(path) if path.is_dir() else Tree(path)
        kind = _kind(path, tree, kind)
        if kind == "dataset":
            return saved_dataset(path, image_column, label_column, target)
        if kind == "parquet":
            return _with_skips(parquet(path, image_column, label_column, tree, target), tree)
        if target is not None and kind == "images":
            raise UserError(
                f"--target {target}: {path} is a folder of images, which has no numbers; give a "
                "Parquet file with a column of images and one of numbers"
            )
        if image_column or (label_column and kind == "images"):
            raise UserError(f"{path} has no columns; leave out --image-column and --label-column")
        if kind == "tars":
            return tars(path, workers, label_column, tree, target)
        return image_folder(path, tree)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {error}; give a source that can be read") from None


def _kind(path: Path, tree: Tree, wanted: str | None) -> str:
    """What a source is. UserError where it is several things and `wanted` does not say which."""
    if path.is_file():
        kind = _SUFFIXES.get(path.suffix.lower())
        if kind is None or wanted not in (None, kind):
            raise UserError(f"{path} is neither a .parquet nor a .tar file nor a folder")
        return kind
    found = _found(path, tree)
    if wanted is not None:
        return wanted
    if len(found) > 1:
        several = ", ".join(
            f"{len(files):,} {_NOUNS[kind]} ({files[0]})" for kind, files in found.items()
        )
        raise UserError(
            f"{path} holds {several}: which of them are the data? Say it with --kind "
            f"{' or --kind '.join(found)}, or move the others away"
        )
    return next(iter(found), "images")


_NOUNS = {
    "dataset": "saved data set",
    "tars": "tars",
    "parquet": "Parquet files",
    "images": "images in folders",
}


def _found(path: Path, tree: Tree) -> dict[str, list[str]]:
    """The files that speak for each kind."""
    files: dict[str, list[str]] = {kind: [] for kind in _NOUNS}
    bare = []
    for name in tree.files:
        base = name.rpartition("/")[2]
        extension = base.rpartition(".")[2].lower()
        if is_shard(base):
            files["tars"].append(name)
        elif extension == "parquet" and not name.endswith("index/keys.parquet"):
            files["parquet"].append(name)
        elif "/" in name and extension in IMAGE_EXTENSIONS and "." in base:
            files["images"].append(name)
        elif "/" in name and "." not in base:
            bare.append(name)
    # img2dataset writes 00000.parquet, a list without images, beside each 00000.tar.
    shards = {name.lower().removesuffix(".tar") for name in files["tars"]}
    files["parquet"] = [
        name for name in files["parquet"] if name.lower().removesuffix(".parquet") not in shards
    ]
    if _is_saved_dataset(path):
        files["dataset"] = ["dataset_dict.json or state.json"]
    if any(files.values()):  # images are what is read where nothing else speaks for itself
        files["images"] += [name for name in bare if begins_as_image(path / name)]
    return {kind: names for kind, names in files.items() if names}


def _is_saved_dataset(path: Path) -> bool:
    """Whether save_to_disk wrote it; another program's state.json says nothing."""
    if (path / "dataset_dict.json").is_file():
        return True
    if not (path / "state.json").is_file():
        return False
    try:
        state = parse_json((path / "state.json").read_bytes())
    except ValueError:
        return any(path.glob("*.arrow"))
    return isinstance(state, dict) and "_data_files" in state


def _with_skips(source: Source, tree: Tree) -> Source:
    for name in tree.files:
        extension = name.lower().rpartition(".")[2]
        if extension in IMAGE_EXTENSIONS:
            tree.passes_over(name, "an image beside the tables: read where a row names it")
        elif extension != "parquet":
            tree.passes_over(name, "no Parquet file")
    return replace(source, skipped=source.skipped + tree.skipped)
