"""The editors' schema, checked by an independent validator."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from bigbatch.configs.load import BUILTIN, read_yaml
from bigbatch.configs.schema import Recipe
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


def errors(tree: dict[str, Any]) -> list[str]:
    return [error.message for error in CHECK.iter_errors(tree)]


def test_every_key_has_a_description() -> None:
    schema = editor_schema()
    parts = {"recipe": schema, **schema["$defs"]}
    keys = {
        f"{part}.{key}": field.get("description", "")
        for part, fields in parts.items()
        for key, field in fields.get("properties", {}).items()
    }
    assert len(keys) > 600
    assert [key for key, text in keys.items() if not text.strip()] == []


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"optimizer": {"name": "lras", "lr": 1}}, "'adadelta', 'adafactor'"),
        ({"optimizer": "lras"}, "'adadelta', 'adafactor'"),
        ({"schedule": {"name": "cosin"}}, "'constant', 'cosine', 'cycles'"),
        ({"clip": {"name": "nrom"}}, "'adaptive', 'norm', 'value'"),
        ({"clip": "nrom"}, "'adaptive', 'norm', 'value', None"),
        ({"loss": {"name": "bec"}}, "'arcface', 'bce', 'center'"),
        ({"model": {"norm": {"name": "grup"}}}, "'group', 'instance'"),
        ({"augment": {"ops": ["blurr"]}}, "'augmix', 'autoaugment'"),
        ({"augment": {"ops": [{"name": "blurr"}]}}, "'augmix', 'autoaugment'"),
    ],
    ids=str,
)
def test_a_wrong_name_is_told_the_right_ones_and_nothing_else(
    tree: dict[str, Any], names: str
) -> None:
    (error,) = errors(tree)
    assert "is not one of [" in error
    assert names in error


def test_of_a_right_name_only_its_own_keys_are_looked_at() -> None:
    (error,) = errors({"optimizer": {"name": "lars", "momentun": 0.9}})
    assert "'momentun' was unexpected" in error
    (error,) = errors({"optimizer": {"name": "lars", "lr": -1}})
    assert "-1 is less than or equal to the minimum of 0" in error


@pytest.mark.parametrize(
    "text",
    [
        "schedule: cosine",
        "optimizer: adamw",
        "model: resnet18",
        "loss: bce",
        "loss: {class_weights: none}",
        "loss: {class_weights: balanced}",
        "loss: {class_weights: [1, 2.5]}",
        "clip: null",
        "average: ema",
        "regularise: {sharpness: sam}",
        "optimizer: {momentum_schedule: cosine}",
        "augment: {ops: [blur, {name: erasing, p: 0.1}]}",
        "schedule: {name: product, factors: [cosine, constant]}",
        "schedule: {name: sequence, pieces: [{length: 1 epochs, schedule: constant}]}",
    ],
)
def test_a_part_may_be_written_by_its_name_alone(text: str) -> None:
    assert errors(yaml.safe_load(text)) == []


def test_every_union_says_what_tells_its_kinds_apart() -> None:
    unions = [
        node
        for node in _nodes(Recipe.model_json_schema())
        if sum("$ref" in c for c in node.get("anyOf", node.get("oneOf", []))) > 1
    ]
    assert len(unions) > 10
    assert all(union["discriminator"]["propertyName"] == "name" for union in unions)
    told = [node["discriminator"] for node in _nodes(editor_schema()) if "discriminator" in node]
    assert len(told) == len(unions)


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for value in inner:
        yield from _nodes(value)
