"""What a rank checks before it trains with the others."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigbatch.configs.errors import RankError
from bigbatch.configs.load import load_recipe
from bigbatch.trainers.inputs import open_inputs
from bigbatch.trainers.job import check_same_data


def test_a_machine_with_other_shards_is_named(digits: Path) -> None:
    inputs = open_inputs(load_recipe("digits", [f"data.path={digits}"]))
    engine: Any = SimpleNamespace(from_main=lambda value: value)
    check_same_data(inputs, engine)
    engine.from_main = lambda value: value | {"val": "0123456789abcdef"}
    with pytest.raises(RankError, match=r"digits/val .* rank 0 has 0123456789abcdef"):
        check_same_data(inputs, engine)
