"""Whatever stands in a recipe file, the loader answers with a Recipe or a UserError."""

import contextlib
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe, parse_recipe
from bigbatch.configs.schema import Recipe

GOOD = load_recipe("digits").model_dump(mode="json")
KEYS = sorted(set(GOOD) | {k for part in GOOD.values() if isinstance(part, dict) for k in part})
WORDS = [
    "name", "lars", "cosine", "5 epochs", "1e999 steps", "-1 steps", "0 samples", ".inf", ".nan",
    "0x" + "f" * 5000, "9" * 5000, "1:30", "2001-01-01", "~", "yes", "\x00", "\ud800", "*a", "&a",
    "!!python/object/apply:os.system", "<<", "1_0", "٥", "",
]  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats()
    | st.text(max_size=8) | st.sampled_from(WORDS)
)  # fmt: skip
KEY = st.sampled_from(KEYS) | st.text(max_size=4) | st.sampled_from(WORDS)
TREES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=4),
    max_leaves=12,
)
YAML = st.lists(
    st.sampled_from(
        ["data", "model", "optimizer", "name", ":", ": ", "\n", "\n  ", "- ", "{", "}", "[", "]",
         ",", "&a ", "*a", "<<: ", "!!set ", "!!binary ", "!x ", "? ", "|\n", ">", "'", '"', "#",
         "---\n", "...\n", "%YAML 1.1\n", "0x1", "1e400", "\t", "\x07", "null", "5 epochs"]
    )
    | st.text(max_size=3),
    max_size=25,
).map("".join)  # fmt: skip
slow_too = [
    pytest.param(300, id="short"),
    pytest.param(1_500, id="long", marks=pytest.mark.slow),
]


def check_tree(tree: Any) -> None:
    with contextlib.suppress(UserError):
        assert isinstance(parse_recipe(tree, "fuzzed"), Recipe)


@pytest.mark.parametrize("examples", slow_too)
def test_any_tree_is_a_recipe_or_a_users_error(examples: int) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(st.dictionaries(KEY, TREES, max_size=6))
    def run(tree: dict[str, Any]) -> None:
        check_tree(tree)

    run()


def change(tree: Any, path: list[int], value: Any) -> Any:
    """A tree with one place, found by going down along `path`, replaced by `value`."""
    if not path or not isinstance(tree, dict | list) or not tree:
        return value
    items = sorted(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    key, inner = items[path[0] % len(items)]
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[key] = change(inner, path[1:], value)
    return copy


@pytest.mark.parametrize("examples", slow_too)
def test_a_sound_recipe_with_one_wrong_place(examples: int) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(st.lists(st.integers(0, 40), min_size=1, max_size=4), TREES)
    def run(path: list[int], value: Any) -> None:
        check_tree(change(GOOD, path, value))

    run()


@pytest.mark.parametrize("examples", slow_too)
def test_any_file_is_a_recipe_or_a_users_error(tmp_path: Path, examples: int) -> None:
    file = tmp_path / "fuzzed.yaml"

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(YAML | st.binary(max_size=40) | TREES.map(lambda tree: json.dumps(tree, default=str)))
    def run(content: str | bytes) -> None:
        raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        file.write_bytes(raw)
        with contextlib.suppress(UserError):
            assert isinstance(load_recipe(file), Recipe)

    run()


@pytest.mark.parametrize("examples", slow_too)
def test_any_override_is_taken_or_refused(examples: int) -> None:
    key = st.lists(KEY, min_size=1, max_size=3).map(".".join)

    @settings(max_examples=examples, deadline=None)
    @given(
        st.builds("{}={}".format, key, YAML | st.sampled_from(WORDS)) | st.text(string.printable)
    )
    def run(override: str) -> None:
        with contextlib.suppress(UserError):
            assert isinstance(load_recipe("digits", [override]), Recipe)

    run()
