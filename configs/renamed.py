"""Keys of a recipe that had another name once. Old files, commands and runs still say those."""

from collections.abc import Mapping
from typing import Any

from bigbatch.configs.errors import UserError

RENAMED = {  # old: new, both with the part that holds them
    "recovery.step_over": "recovery.skip_steps",
    "ensemble.gate": "ensemble.selection_margin",
}


def with_new_names(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe's tree under today's names, and the old names that it had.

    Raises UserError where a key is written under both.
    """
    renamed, found = dict(tree), []
    for old, new in RENAMED.items():
        (part, key), (_, now) = old.split("."), new.split(".")
        inner = renamed.get(part)
        if not isinstance(inner, Mapping) or key not in inner:
            continue
        if now in inner:
            raise UserError(f"{old} is the old name of {new}, and both are written; remove {old}")
        renamed[part] = {now if k == key else k: value for k, value in inner.items()}
        found.append(old)
    return renamed, found


def with_old_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree under the first names that its keys had: a new name changes no hash."""
    old_name = {new: old.split(".")[1] for old, new in RENAMED.items()}
    return {
        part: {old_name.get(f"{part}.{key}", key): value for key, value in inner.items()}
        if isinstance(inner, Mapping)
        else inner
        for part, inner in tree.items()
    }
