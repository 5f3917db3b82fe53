"""From a recipe's name or file to a checked Recipe."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from bigbatch.configs.errors import UserError
from bigbatch.configs.redact import redact, refuse_secrets
from bigbatch.configs.schema import Recipe

_DEEPEST = 20  # parts of an override's key
BUILTIN = Path(__file__).parent
MAX_BYTES = 1_000_000
MAX_VALUES = 100_000


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe by built-in name or by path, with `base:` and ``key=value`` applied.

    Raises UserError with all problems at once, each with its place and the remedy.
    """
    path = find_recipe(name)
    tree = _inherit(path, ())
    for override in overrides:
        _override(tree, override)
    tree.setdefault("name", path.stem)
    return parse_recipe(tree, str(name))


def change_recipe(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """A resolved recipe with further ``key=value`` applied. Raises UserError like load_recipe."""
    tree = recipe.model_dump(mode="json")
    changes = list(overrides)
    for override in changes:
        _override(tree, override)
    return parse_recipe(tree, f"{recipe.name} with {' '.join(changes)}")


def parse_recipe(tree: Mapping[str, Any], source: str) -> Recipe:
    """Check a tree of plain values; `source` is named in the error."""
    refuse_secrets(tree, f"recipe {source}")
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(e, tree) for e in error.errors()]
        raise UserError(f"recipe {source}:\n" + "\n".join(f"  {x}" for x in lines)) from None


def builtin_recipes() -> list[str]:
    return sorted(p.stem for p in BUILTIN.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """A file as given, or a built-in recipe by its name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if os.path.isfile(path):  # False, too, for a name that no file can have
            return path
    elif (BUILTIN / f"{name}.yaml").is_file() and len(path.parts) == 1:
        return BUILTIN / f"{name}.yaml"
    known = builtin_recipes()
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"no recipe {str(name)!r}: {hint}give a path that ends in .yaml, or one of "
        f"{', '.join(known)}"
    )


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every value written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """safe_load with YAML 1.2's booleans and floats, which refuses a key written twice.

    PyYAML follows YAML 1.1, where `wandb: off` is False and `lr: 1e-4` is text.
    """


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:\d+\.\d*|\.?\d+(?=[eE])|\.\d+|\.inf|\.nan)(?:[eE][-+]?\d+)?$", re.I),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise UserError(f"key {key!r} on line {key_node.start_mark.line + 1} is not a name")
        if key in seen:
            raise UserError(f"key {key!r} is written twice; remove one of them")
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping; raise UserError where it is not one."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES:,} bytes: that is no recipe")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping; write lines of `key: value`")
    return tree


def _parse(text: str, source: str) -> Any:
    try:
        loader = _Loader(text)  # a SafeLoader: makes plain values only
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MAX_VALUES:
            raise UserError(f"{source} stands for more than {MAX_VALUES:,} values: no recipe does")
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{source} is not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source} is not valid YAML: {_shortened(redact(str(error)))}") from None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for once its aliases are written out.

    A few lines of aliases of aliases can stand for billions ("billion laughs"), and an alias
    inside its own anchor for infinitely many, which counts as too many.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # met again inside itself: endless
        inner: list[yaml.Node] = []
        for part in node.value:
            inner += part if isinstance(part, tuple) else (part,)
        known[id(node)] = 1 + sum(_values(part, known) for part in inner)
    return known[id(node)]


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _inherit(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise UserError(f"`base:` goes round in a circle: {chain}; remove one of them")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: base is {base!r}; it must be one recipe's name or path")
    beside = path.parent / base
    parent = beside if beside.suffix and os.path.isfile(beside) else find_recipe(base)
    inherited = _inherit(parent, (*seen, path.resolve()))
    inherited.pop("name", None)  # a run is named after its own recipe
    return _merge(inherited, tree)


def _merge(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `base`, key by key. A part with another `name` replaces the base's part."""
    merged = dict(base)
    for key, value in own.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            other_kind = "name" in value and value["name"] != below.get("name", value["name"])
            merged[key] = value if other_kind else _merge(below, value)
        else:
            merged[key] = value
    return merged


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path) or len(path) > _DEEPEST:
        raise UserError(f"override {text!r} is not of the form key=value, such as optimizer.lr=2")
    # Built as a tree of one leaf, so that an override merges by the same rule as `base:`.
    leaf: Any = _parse(value, f"override {text!r}")
    for part in reversed(path):
        leaf = {part: leaf}
    merged = _merge(tree, leaf)
    tree.clear()
    tree.update(merged)


def _explain(error: Any, tree: Mapping[str, Any]) -> str:
    """One line for one pydantic error: place, value, rule, remedy."""
    # Pydantic puts the tag of a union's branch into the place; a reader never wrote it.
    place = _written(error["loc"], tree)
    where = ".".join(map(str, place)) or "recipe"
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        valid = _valid_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(place[-1]), valid, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{where}: unknown key; {hint}valid keys: {', '.join(valid)}"
    if kind == "missing":
        return f"{where}: missing; it has no default, so write it"
    if kind == "value_error":
        return message if where == "recipe" else f"{where}: {message}"
    try:
        value = repr(error["input"])
    except ValueError:  # an integer of thousands of digits
        value = "a number too long to show"
    return f"{where} = {_shortened(value, 80)}: {message}"


def _written(loc: Sequence[Any], tree: Any) -> list[Any]:
    """The parts of a pydantic location that stand in the recipe as written."""
    place: list[Any] = []
    for depth, part in enumerate(loc):
        last = depth == len(loc) - 1
        inside = isinstance(tree, Mapping) and part in tree
        if inside or (isinstance(tree, list) and isinstance(part, int)):
            tree = tree[part]
            place.append(part)
            continue
        named = isinstance(tree, Mapping) and not last
        tag = tree if isinstance(tree, str) else tree.get("name") if named else None
        if part != tag:
            place.append(part)
    return place


def _valid_keys(loc: Sequence[Any]) -> list[str]:
    """The keys that the part at a pydantic location may hold."""
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
