"""The split of a folder of tars that megatron-energon prepared: .nv-meta/split.yaml."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from braceexpand import braceexpand

from bigbatch.configs.errors import UserError

EXCLUDED = "excluded"
SPLIT_FILE = ".nv-meta/split.yaml"


def energon_parts(tars: Sequence[Path]) -> list[str] | None:
    """The part of each archive, EXCLUDED for one that is left out; None without a split.yaml.

    The file lies in a folder beside the archives or above them, to which its names are
    relative. Raises UserError where it cannot be read or has no word about one of them.
    """
    folders = dict.fromkeys(folder for tar in tars for folder in tar.absolute().parents)
    root = next((folder for folder in folders if (folder / SPLIT_FILE).is_file()), None)
    if root is None:
        return None
    part_of = _read(root / SPLIT_FILE)
    parts = []
    for tar in tars:
        name = Path(os.path.relpath(tar, root)).as_posix()
        if name not in part_of:
            raise UserError(
                f"{root / SPLIT_FILE} names no part for {name}; run `energon prepare` again, or "
                "remove the file and let `bigbatch shard` divide the samples"
            )
        parts.append(part_of[name])
    return parts


def one_part_only(tars: Sequence[Path]) -> None:
    """UserError where archives of several parts, or excluded ones, would become one split."""
    parts = energon_parts(tars)
    if parts is not None and (len(set(parts)) > 1 or EXCLUDED in parts):
        found = ", ".join(f"{part} ({parts.count(part)})" for part in dict.fromkeys(parts))
        raise UserError(
            f"{tars[0].parent} holds shards of several parts by its {SPLIT_FILE}: {found}; an "
            "index is one split: move each part into a folder of its own, or use `bigbatch shard`, "
            "which keeps the parts apart"
        )


def _read(path: Path) -> dict[str, str]:
    """The part of each archive that is named."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        parts = {str(k): [str(n) for n in v or ()] for k, v in content["split_parts"].items()}
        excluded = [str(name) for name in content.get("exclude") or ()]
        part_of = {
            name: part
            for part, patterns in (*parts.items(), (EXCLUDED, excluded))
            for pattern in patterns
            for name in braceexpand(pattern, escape=False)
        }
    except (
        OSError,
        ValueError,
        yaml.YAMLError,
        RecursionError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); run `energon prepare` again"
        ) from None
    samples = [name for name in excluded if not name.endswith(".tar")]
    if samples:
        raise UserError(
            f"{path} excludes single samples ({samples[0]}), which is not supported; leave them "
            "out of the archives"
        )
    return part_of
