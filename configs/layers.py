"""Layers of a recipe: a file over its base, the command line over the file."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from bigbatch.configs.explain import is_named, keys_of_kind, shortened, usual_kind
from bigbatch.configs.files import to_json
from bigbatch.configs.renamed import RENAMED, with_new_names

Tree = dict[str, Any]
Place = tuple[str, ...]


def canonical(tree: Mapping[str, Any]) -> tuple[Tree, list[str]]:
    """A layer in one form, today's names and parts as mappings, and what to say of old names."""
    renamed, found = with_new_names(tree)
    notes = [f"{old} is now called {RENAMED[old]}; write that" for old in found]
    return _with_kinds(renamed, ()), notes


def _with_kinds(tree: Mapping[str, Any], place: Place) -> Tree:
    """A tree in which parts that are written by their name alone (`schedule: cosine`) say it."""
    out = Tree()
    for key, value in tree.items():
        out[key] = _with_kind(value, (*place, key))
    return out


def _with_kind(value: Any, place: Place) -> Any:
    if isinstance(value, Mapping):
        return _with_kinds(value, place)
    if isinstance(value, list):  # of parts, such as augment.ops
        return [_with_kind(item, place) for item in value]
    if isinstance(value, str) and value != "none" and is_named(place):
        return {"name": value}
    return value


def lay(
    below: Mapping[str, Any], layers: Sequence[Tree], whole: Collection[Place] = ()
) -> tuple[Tree, list[str]]:
    """`layers` over `below`, one after another, key by key; and what to say of it.

    A part that gets another `name` keeps those of its keys in `below` that the new kind has
    as well. Nothing is kept of a part at a place in `whole`: it was written as a whole. What
    `layers` hold themselves always stays, in whatever order it comes.
    """
    merged, own = dict(below), Tree()
    for layer in layers:
        merged, own = merge(merged, layer), merge(own, layer)
    notes: list[str] = []
    return _settle(merged, below, own, (), whole, notes), notes


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Tree:
    """`above` over `below`, key by key."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, dict) and isinstance(value, dict):
            value = merge(under, value)
        merged[key] = value
    return merged


def named_parts(tree: Mapping[str, Any], place: Place = ()) -> Iterator[Place]:
    """The places of all parts in a tree that say their `name`; the recipe itself is none."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if "name" in value:
                yield (*place, key)
            yield from named_parts(value, (*place, key))


def give_way(before: Tree, layer: Mapping[str, Any], place: Place) -> None:
    """Take the part at a place, which both layers write as a whole, out of the one `before` where
    the other one's is of another kind: the last one counts."""
    *above, key = place
    for part in above:
        before, layer = before.get(part, {}), layer[part]  # it may have given way already
    if key in before and is_named(place) and before[key]["name"] != layer[key]["name"]:
        del before[key]


def _settle(
    merged: Tree,
    below: Mapping[str, Any],
    own: Mapping[str, Any],
    place: Place,
    whole: Collection[Place],
    notes: list[str],
) -> Tree:
    """`merged` without what its parts of another kind than in `below` cannot keep."""
    settled = dict(merged)
    for key, part in merged.items():
        was, written = below.get(key), own.get(key)
        if not (isinstance(part, dict) and isinstance(was, dict) and isinstance(written, dict)):
            continue
        here = (*place, key)
        old = was.get("name", usual_kind(here))
        kind = part.get("name", old)
        valid = keys_of_kind(here, kind) if old is not None and kind != old else None
        if valid is not None:
            valid = set(written) if here in whole else valid | set(written)
            kept = {k: v for k, v in part.items() if k in valid}
            if kept != part or valid != keys_of_kind(here, old):
                notes += _note(".".join(here), old, part, kept, written)
            part = dict(written) if here in whole else kept
        settled[key] = _settle(part, was, written, here, whole, notes)
    return settled


def _note(place: str, old: Any, part: Tree, kept: Tree, written: Mapping[str, Any]) -> list[str]:
    """What to say of a part that changed its kind: which keys went, and which came along."""
    parts = {
        "dropped": [f"{k}={_shown(v)}" for k, v in part.items() if k not in kept],
        "kept": [f"{k}={_shown(v)}" for k, v in kept.items() if k not in written],
    }
    said = [f"{what} {', '.join(keys)}" for what, keys in parts.items() if keys]
    return [f"{place} is now {part['name']}, not {old}: {'; '.join(said)}"] if said else []


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else shortened(to_json(value, default=str), 80)
