"""What a rank checks before it trains with the others."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import create_run
from bigbatch.trainers.job import check_same_data
from bigbatch.trainers.planning.inputs import open_inputs
from tests.helpers.ranks import end_ranks


def test_a_machine_with_other_shards_is_named(digits: Path) -> None:
    inputs = open_inputs(load_recipe("digits", [f"data.path={digits}"]))
    engine: Any = SimpleNamespace(from_main=lambda value: value)
    check_same_data(inputs, engine)
    engine.from_main = lambda value: value | {"val": "0123456789abcdef"}
    with pytest.raises(UserError, match=r"digits/val .* rank 0 has 0123456789abcdef"):
        check_same_data(inputs, engine)


def test_a_split_that_one_machine_lacks_is_named(digits: Path) -> None:
    """Data without a test split trains; not where another rank would evaluate one."""
    whole = open_inputs(load_recipe("digits", [f"data.path={digits}"]))
    splits = {role: index for role, index in whole.splits.items() if role != "test"}
    hashes = {role: index.hash for role, index in whole.splits.items()}
    engine: Any = SimpleNamespace(from_main=lambda value: hashes)
    with pytest.raises(UserError, match=r"split test has index none here, rank 0 has \w{16}"):
        check_same_data(replace(whole, splits=splits), engine)
    engine.from_main = lambda value: {role: index.hash for role, index in splits.items()}
    with pytest.raises(UserError, match=r"digits/test has index \w{16} here, rank 0 has none"):
        check_same_data(whole, engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "said"), [("1", "bigbatch: rank 1: no shards"), ("0,1", "bigbatch: no shards")]
)
def test_one_rank_says_what_it_alone_or_every_rank_meets(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], ranks: str, said: str
) -> None:
    recipe = load_recipe("digits", [f"data.path={digits}", "log.wandb=off"])
    run = create_run(tmp_path / "run", recipe)
    script = Path(__file__).parents[1] / "helpers" / "failing_rank.py"
    ended = end_ranks(2, script, ranks, run.path)
    assert ended[1] == 2
    assert ended[0] == (2 if "0" in ranks else 1)  # who is left alone ends as well
    told = [line for line in capfd.readouterr().err.splitlines() if "no shards" in line]
    assert len(told) == 1
    assert told[0].startswith(said)
