"""The tables of docs/craft.md name exactly what the schema has for models."""

import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from bigbatch.configs.blocks import Attention, Pool
from bigbatch.configs.init import Init, Weights
from bigbatch.configs.model import TEACHING, Model
from bigbatch.configs.norm import Head, Norm

PAGE = (Path(__file__).resolve().parent.parent / "docs/craft.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def cells(text: str) -> list[str]:
    """The code in the first column of a section's tables."""
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return [row.split("`")[1] for row in rows]


def kinds(union: Any) -> dict[str, type[BaseModel]]:
    models = get_args(get_args(union)[0])
    return {get_args(m.model_fields["name"].annotation)[0]: m for m in models}


def parts(keys: list[str], prefix: str) -> dict[str, dict[str, Any]]:
    """By name what a table says of a part: its other keys, and the defaults that are written."""
    flow = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    found = [yaml.safe_load(text.replace(": 1e-4", ": 1.0e-4")) for text in flow]
    return {part.pop("name"): part for part in found}


def agree(table: dict[str, dict[str, Any]], union: Any) -> None:
    """Every kind is there, with keys that it has and the defaults that it has."""
    models = kinds(union)
    assert table.keys() == models.keys()
    for name, keys in table.items():
        for key, value in keys.items():
            field = models[name].model_fields[key]
            assert isinstance(value, str) or field.default == value, (name, key)


def test_norms() -> None:
    table = parts([k for k in cells(section("Normalisation")) if k.startswith("{")], "")
    agree(table, Norm)


def test_heads_and_the_rest() -> None:
    keys = cells(section("Normalisation"))
    agree(parts([k for k in keys if k.startswith("model.head")], "model.head: "), Head)
    assert "model.weight_standardization: true" in keys


def test_initialisation() -> None:
    keys = cells(section("Initialisation"))
    agree(parts(keys, "weights: "), Weights)
    assert {key.partition(":")[0] for key in keys} == set(Init.model_fields)


def test_blocks() -> None:
    keys = cells(section("Models"))
    agree(parts([k for k in keys if k.startswith("model.pool")], "model.pool: "), Pool)
    attention = parts([k for k in keys if k.startswith("model.attention")], "model.attention: ")
    assert set(attention) == set(get_args(Attention.model_fields["name"].annotation))
    assert set(attention["se"]) | {"name"} == set(Attention.model_fields)
    said = {key.partition(":")[0] for key in keys if key.startswith("model.")}
    assert said == {
        f"model.{key}"
        for key in ("activation", "pool", "attention", "joined_stages", "recompute", "compile")
    }


def test_sources() -> None:
    named = re.findall(
        r"`(\w+)`", section("Models").partition("| teaching nets |")[2].partition("|")[0]
    )
    assert tuple(named) == TEACHING


def test_every_key_of_a_model_is_explained() -> None:
    known = {"stem", "channels_last"}  # as before: docs/recipes.md
    for key in Model.model_fields.keys() - known:
        assert f"model.{key}" in PAGE, key
