"""What a user is told of a recipe that its schema refuses, and which keys a part may hold."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from bigbatch.configs.batch import CHANGING, NUMBER
from bigbatch.configs.peers import peers_key
from bigbatch.configs.schema import Recipe

# Pydantic's words for a value where a part with keys belongs.
_NO_PART = ("model_attributes_type", "model_type", "dict_type")
# Its name for a branch of a union that no key tells apart, such as a number or a word.
_BRANCH = re.compile(r"(constrained-)?(int|float|str|bool)|literal\[.*\]")


def explain_all(errors: Iterable[Any], tree: Mapping[str, Any]) -> list[str]:
    """A line for each refused value; where several kinds may stand, it says what each asks for."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for error in errors:
        loc = error["loc"]
        tells = isinstance(loc[-1], str) and _BRANCH.fullmatch(loc[-1]) if loc else None
        found.setdefault(loc[:-1] if tells and not _stands(loc, tree) else loc, []).append(error)
    lines = []
    for loc, (first, *others) in found.items():
        more = [error["msg"].removeprefix("Input should be ") for error in others]
        lines.append(", or ".join([explain({**first, "loc": loc}, tree), *more]))
    return lines


def _stands(loc: Sequence[Any], tree: Any) -> bool:
    """Whether the last part of a location is a key that a recipe has written."""
    for part in loc:
        if not (isinstance(tree, Mapping) and part in tree):
            return False
        tree = tree[part]
    return True


def explain(error: Any, tree: Mapping[str, Any]) -> str:
    """One line for one pydantic error: place, value, rule, remedy."""
    # Pydantic puts the tag of a union's branch into the place; a reader never wrote it.
    place = _written(error["loc"], tree)
    where = ".".join(map(str, place)) or "recipe"
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        valid = valid_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(place[-1]), valid, 1)
        if told := peers_key([*map(str, place)], near):
            return f"{where}: {told}"
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{where}: unknown key; {hint}valid keys: {', '.join(valid)}"
    if kind == "union_tag_invalid":
        known = re.findall(r"'([^']+)'", error["ctx"]["expected_tags"])
        tag = str(error["ctx"]["tag"])
        near = difflib.get_close_matches(tag, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        known += ["a number"] if CHANGING in error["loc"] else []
        return f"{where} = {shortened(repr(tag), 80)}: {hint}there are {', '.join(known)}"
    if kind == "union_tag_not_found":
        return f"{where}: says no `name`; there are {', '.join(_kinds_at(place))}"
    if kind == "missing":
        return f"{where}: missing; it has no default, so write it"
    if kind == "value_error":
        return message if where == "recipe" else f"{where}: {message}"
    try:
        value = repr(error["input"])
    except ValueError:  # an integer of thousands of digits
        value = "a number too long to show"
    if kind in _NO_PART:
        message = _how_to_write(place) or message
    elif kind == "list_type":
        message = f"a list is written [...], as in {where}=[{shortened(value, 80)}]"
    return f"{where} = {shortened(value, 80)}: {message}"


def _how_to_write(place: Sequence[Any]) -> str | None:
    """What stands at a place where a number or a word was written for a whole part."""
    if kinds := _kinds_at(place):
        return f"write its kind, KIND or {{name: KIND, ...}}; there are {', '.join(kinds)}"
    keys = sorted({key for model in _parts_at(place) for key in model.model_fields})
    return f"write its keys, {{KEY: VALUE, ...}}; there are {', '.join(keys)}" if keys else None


def _kinds_at(place: Sequence[Any]) -> list[str]:
    """The kinds of parts that may stand at a place in a recipe, in the schema's order."""
    named = [m for m in _parts_at(place) if "name" in m.model_fields]
    return [str(kind) for model in named for kind in _names(model)]


def _written(loc: Sequence[Any], tree: Any) -> list[Any]:
    """The parts of a pydantic location that stand in the recipe as written."""
    place: list[Any] = []
    for depth, part in enumerate(loc):
        if part in (NUMBER, CHANGING):
            continue
        last = depth == len(loc) - 1
        inside = isinstance(tree, Mapping) and part in tree
        if inside or (isinstance(tree, list) and isinstance(part, int)):
            tree = tree[part]
            place.append(part)
            continue
        named = isinstance(tree, Mapping) and not last
        kind = tree.get("name", usual_kind(place)) if named else None
        tag = tree if isinstance(tree, str) else kind
        if part != tag:
            place.append(part)
    return place


def usual_kind(place: Sequence[str]) -> Any:
    """The kind of the part at a place in a recipe where the part does not say its `name`."""
    names = [m.model_fields["name"] for m in _parts_at(place) if "name" in m.model_fields]
    return next((f.default for f in names if not f.is_required()), None)


def is_named(place: Sequence[str]) -> bool:
    """Whether a recipe has a part at a place which says its kind, or its model, by `name`."""
    return bool(place) and any("name" in m.model_fields for m in _parts_at(place))


def keys_of_kind(place: Sequence[str], kind: Any) -> set[str] | None:
    """The keys of the part at a place in a recipe that calls itself `kind`; None where there is
    no such part."""
    named = [m for m in _parts_at(place) if "name" in m.model_fields]
    found = [m for m in named if not _names(m) or kind in _names(m)]
    return {key for m in found for key in m.model_fields} or None


def _parts_at(place: Sequence[Any]) -> list[type[BaseModel]]:
    """What may stand at a place in a recipe: one class, or those of a union."""
    models: list[type[BaseModel]] = [Recipe]
    for key in place:
        if isinstance(key, int):  # of a list's elements: the list's parts are known
            continue
        fields = [m.model_fields[key] for m in models if key in m.model_fields]
        models = [m for f in fields for m in _models_in((f.annotation, *f.metadata))]
    return models


def valid_keys(loc: Sequence[Any]) -> list[str]:
    """The keys that the part at a location may hold; its last word may be a kind of the part."""
    models: list[type[BaseModel]] = [Recipe]
    for part in loc:
        inner: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                field = model.model_fields[part]
                inner += _models_in(field.annotation) + _models_in(tuple(field.metadata))
            elif "name" in model.model_fields and part in _names(model):
                inner.append(model)
        models = inner or models
    return sorted({key for model in models for key in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = annotation if isinstance(annotation, tuple) else getattr(annotation, "__args__", ())
    return [m for a in arguments for m in _models_in(a)]


def _names(model: type[BaseModel]) -> tuple[Any, ...]:
    return getattr(model.model_fields["name"].annotation, "__args__", ())


def shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
