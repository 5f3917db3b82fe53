"""docs/craft.md names what a recipe may say of losses and regularisation, all of it, no more."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from bigbatch.configs.load import load_recipe
from bigbatch.configs.losses import Loss
from bigbatch.configs.regularise import Regularise

PAGE = (Path(__file__).parents[1] / "docs" / "craft.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    rows = [line for line in section(title).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_every_loss_stands_in_the_table_with_its_keys() -> None:
    schema: Any = TypeAdapter(Loss).json_schema()
    expected = {}
    for form in (
        schema["$defs"][ref.rpartition("/")[2]]
        for ref in schema["discriminator"]["mapping"].values()
    ):
        keys = form["properties"].keys() - {"name", "class_weights", "class_weights_from"}
        expected[form["properties"]["name"]["const"]] = keys
    found = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[3])) for row in table("Losses")}
    assert found == expected


def test_every_regulariser_stands_in_the_table() -> None:
    named = {
        name
        for row in table("Regularisation")
        for name in re.findall(r"`regularise\.(\w+)`", row[0])
    }
    assert named == set(Regularise.model_fields)


@pytest.mark.parametrize("title", ["Losses", "Regularisation"])
def test_the_recipes_of_the_page_are_valid(title: str) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", section(title), re.S):
        written = yaml.safe_load(block)
        overrides = [
            f"{key}={yaml.safe_dump(part, default_flow_style=True)}"
            for key, part in written.items()
        ]
        load_recipe("digits", ["data.sampling=uniform", *overrides])
