"""From a recipe's name or file to a checked Recipe."""

import copy
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bigbatch.configs.errors import UserError, reason_of
from bigbatch.configs.explain import explain_all, shortened
from bigbatch.configs.layers import Place, Tree, canonical, give_way, lay, named_parts
from bigbatch.configs.notices import notice
from bigbatch.configs.redact import redact, refuse_secrets
from bigbatch.configs.renamed import with_new_names
from bigbatch.configs.schema import Recipe

_DEEPEST = 20  # parts of an override's key
BUILTIN = Path(__file__).parent
MAX_BYTES = 1_000_000
MAX_VALUES = 100_000
Say = Callable[[str], None]


def load_recipe(
    name: str | Path, overrides: Iterable[str] = (), say: Say | None = notice
) -> Recipe:
    """Load a recipe by built-in name or by path, with `base:` and ``key=value`` applied.

    `say` is told, once the recipe is right, of old names in it and of what a part lost as it
    got another kind. Raises UserError with all problems at once, each with place and remedy.
    """
    path = find_recipe(name)
    tree, notes = _inherit(path, ())
    tree, more = _overridden(tree, overrides)
    tree.setdefault("name", path.stem)
    recipe = parse_recipe(tree, str(name))
    _tell((*notes, *more), say)
    return recipe


def change_recipe(recipe: Recipe, overrides: Iterable[str], say: Say | None = notice) -> Recipe:
    """A resolved recipe with further ``key=value`` applied; says and raises as load_recipe."""
    changes = list(overrides)
    # Only what was written: another kind of a part keeps no defaults of the one before.
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    tree.setdefault("schedule", {"name": recipe.schedule.name})  # a change may name none
    tree, notes = _overridden(tree, changes)
    changed = parse_recipe(tree, f"{recipe.name} with {' '.join(changes)}")
    _tell(notes, say)
    return changed


def _tell(notes: Iterable[str], say: Say | None) -> None:
    if say is not None:
        for note in notes:
            say(note)


def parse_recipe(tree: Mapping[str, Any], source: str) -> Recipe:
    """Check a tree of plain values, of this version or an older one; errors name `source`."""
    refuse_secrets(tree, f"recipe {source}")
    try:
        tree, _ = with_new_names(tree)
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = explain_all(error.errors(), tree)
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
    if path.suffix in (".yaml", ".yml"):
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.y*ml"))[:8])
        near = f"; there are {there}" if there else ""
        raise UserError(f"no file {str(name)!r} here ({Path.cwd()}){near}")
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f"did you mean {close[0]}? " if close else ""
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
        remedy = "give the path of a file that can be read"
        raise UserError(f"cannot read {path}: {reason_of(error)}; {remedy}") from None
    tree = copy.deepcopy(_parse_file(text, str(path)))
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping; write lines of `key: value`")
    return tree


@lru_cache(maxsize=8)
def _parse_file(text: str, source: str) -> Any:
    """The same text is read once: a search takes one recipe for all of its trials."""
    return _parse(text, source)


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
        raise UserError(f"{source} is not valid YAML: {shortened(redact(str(error)))}") from None


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


def _inherit(path: Path, seen: tuple[Path, ...]) -> tuple[Tree, list[str]]:
    """A file's tree over its base's, and what to say of it: nothing of our own files."""
    if path.resolve() in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise UserError(f"`base:` goes round in a circle: {chain}; remove one of them")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    tree, notes = canonical(tree)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base is {base!r}; it must be one recipe's name or path")
        beside = path.parent / base
        parent = beside if beside.suffix and os.path.isfile(beside) else find_recipe(base)
        inherited, before = _inherit(parent, (*seen, path.resolve()))
        inherited.pop("name", None)  # a run is named after its own recipe
        tree, more = lay(inherited, [tree])
        notes = [*before, *notes, *more]
    return tree, [] if path.parent == BUILTIN else notes


def _overridden(tree: Tree, overrides: Iterable[str]) -> tuple[Tree, list[str]]:
    """A tree with ``key=value`` applied, in whatever order, and what to say of it."""
    layers, notes, whole = list[Tree](), list[str](), dict[Place, Tree]()
    for text in overrides:
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path) or len(path) > _DEEPEST:
            raise UserError(
                f"override {text!r} is not of the form key=value, such as optimizer.lr=2"
            )
        written: Any = _parse(value, f"override {text!r}")
        leaf = written
        for part in reversed(path):
            leaf = {part: leaf}
        layer, old_names = canonical(leaf)
        layers.append(layer)
        notes += old_names
        # KEY={name: ...} is a part written as a whole; KEY.name=NAME, or KEY=NAME, names one and
        # keeps the rest.
        if isinstance(written, dict):
            for place in named_parts(layer):
                if len(place) >= len(path):
                    if place in whole:
                        give_way(whole[place], layer, place)
                    whole[place] = layer
    tree, more = lay(tree, layers, whole)
    return tree, [*notes, *more]
