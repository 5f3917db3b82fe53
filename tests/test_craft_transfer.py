"""docs/transfer.md names every kind of transfer with its keys, and its recipe is valid."""

import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from bigbatch.configs.load import parse_recipe
from bigbatch.configs.transfer import Transfer

PAGE = (Path(__file__).resolve().parent.parent / "docs/transfer.md").read_text()


def test_every_kind_stands_in_the_table_with_keys_that_it_has() -> None:
    kinds: dict[str, type[BaseModel]] = {
        get_args(m.model_fields["name"].annotation)[0]: m for m in get_args(get_args(Transfer)[0])
    }
    table = PAGE.partition("## What learns")[2].partition("\n**Stages**")[0]
    rows = re.findall(r"^\| `(\{name: .*?\})` \|", table, re.M)
    written: list[dict[str, Any]] = [yaml.safe_load(row.replace("...", "")) for row in rows]
    assert {row["name"] for row in written} == kinds.keys()
    for row in written:
        own = kinds[row["name"]].model_fields.keys()
        assert set(row) <= own
        missing = own - set(row) - {"stage_decay", "rates"}  # said below the table
        assert missing == set(), row["name"]
    assert "`stage_decay`" in PAGE
    assert "`rates:" in PAGE


def test_the_recipe_of_the_page_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    recipe = parse_recipe(yaml.safe_load(block), "docs/transfer.md")
    assert recipe.transfer is not None
