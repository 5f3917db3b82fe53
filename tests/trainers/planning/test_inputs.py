from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.data.writing.shard import shard
from bigbatch.trainers.planning.inputs import open_inputs


def test_a_data_set_without_a_test_split(tmp_path: Path) -> None:
    """It trains, and says what it will not report; a split of another name is missed."""
    shard("digits", tmp_path / "digits", split="0.8,0.2", progress=False)
    keys = [f"data.path={tmp_path / 'digits'}", "global_batch=256", "micro_batch=64"]
    usual = open_inputs(load_recipe("digits", keys))
    assert list(usual.splits) == ["train", "val"]
    assert usual.notes == (
        f"{tmp_path / 'digits'} has no split test: the run reports scores of val alone",
    )
    with pytest.raises(UserError, match=r"has no split exam; set data\.test=null to train without"):
        open_inputs(load_recipe("digits", [*keys, "data.test=exam"]))
    inputs = open_inputs(load_recipe("digits", [*keys, "data.test=null"]))
    assert list(inputs.splits) == ["train", "val"]
    assert inputs.notes == ()
