"""Whether two recipes are the same run: what differs, key by key, and a hash to call one by."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from bigbatch.configs.renamed import with_old_names
from bigbatch.configs.schema import Recipe

# What may change between two starts of one run: where it logs and saves, where data and a teacher
# lie, how many processes decode, and whether activations are kept or computed again. None of it
# reaches a weight (checkpoints know data and teacher by their content), so none of it enters the
# recipe's hash.
NO_EFFECT: dict[str, Any] = {
    "name": True,
    "backend": True,
    "log": True,
    "checkpoint": True,
    "recovery": {"stall_s", "corruption"},
    "data": {"path", "cache", "cache_gb", "workers", "threads"},
    "model": {"recompute"},
    "distill": {"teacher", "cache", "cache_gb"},
}
_SHOWN = 5  # differences that a message names


def recipe_hash(recipe: Recipe) -> str:
    """16 hex digits over everything in the recipe that can reach a weight.

    Only what differs from the schema's defaults is counted, so a key that a later version adds
    or renames changes no hash. It is a name to tell runs apart by; `differences` decides.
    """
    tree = recipe.model_dump(mode="json", exclude=NO_EFFECT, exclude_defaults=True)
    # A part of which only what has no effect was set counts as one that was not set.
    tree = {key: value for key, value in tree.items() if value or key not in NO_EFFECT}
    tree = with_old_names(tree)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def differences(
    there: Recipe, here: Recipe, places: tuple[str, str] = ("there", "here")
) -> list[str]:
    """`key = A there, B here` for each key that can reach a weight and differs.

    Where a part is of another kind (another `name`), only its kind is named.
    """
    trees = [r.model_dump(mode="json", exclude=NO_EFFECT) for r in (there, here)]
    return tree_differences(trees[0], trees[1], places)


def tree_differences(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    places: tuple[str, str] = ("there", "here"),
) -> list[str]:
    """The same of two trees of plain values."""
    return _differences(there, here, places, "")


def _differences(
    there: Mapping[str, Any], here: Mapping[str, Any], places: tuple[str, str], prefix: str
) -> list[str]:
    keys = list(dict.fromkeys((*there, *here)))
    if there.get("name") != here.get("name"):
        keys = ["name"]
    found = []
    for key in keys:
        a, b = there.get(key), here.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, places, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} = {_shown(a)} {places[0]}, {_shown(b)} {places[1]}")
    return found


def summary(lines: list[str]) -> str:
    """The first few differences, and how many more there are."""
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def _shown(value: JsonValue) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
