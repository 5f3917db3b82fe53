"""The editors' schema, checked by an independent validator."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from bigbatch.configs.load import BUILTIN, read_yaml
from bigbatch.launcher.cli.editor import editor_schema

CHECK = jsonschema.Draft202012Validator(editor_schema())


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(editor_schema())


@pytest.mark.parametrize("path", sorted(BUILTIN.glob("*.yaml")), ids=lambda p: p.stem)
def test_built_in_recipes_fit(path: Path) -> None:
    CHECK.validate(read_yaml(path))


@pytest.mark.parametrize(
    "text",
    [
        "base: digits",
        "base: digits\noptimizer: {lr: 2}",
        "data: {sampling: balanced}",
        "data: {sampling: {name: balanced}}",
        "duration: 1.2M samples",
        "schedule: {name: cycles, cycles: 5}",
    ],
)
def test_a_file_may_say_less_than_a_whole_recipe(text: str) -> None:
    CHECK.validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "tree",
    [
        {"optimiser": {"name": "lars"}},
        {"optimizer": {"name": "lars", "momentun": 0.9}},
        {"optimizer": {"name": "lras"}},
        {"data": {"sampling": "blanced"}},
        {"duration": "90"},
        {"seed": -1},
        {"global_batch": "256"},
    ],
    ids=str,
)
def test_mistakes_are_found(tree: dict[str, Any]) -> None:
    assert not CHECK.is_valid(tree)
