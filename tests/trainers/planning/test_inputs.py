from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.data.writing.shard import shard
from bigbatch.trainers.planning.inputs import open_inputs


def test_a_data_set_without_a_test_split(tmp_path: Path) -> None:
    """It is no missing folder that should hold tars: the remedy is to say that there is none."""
    shard("digits", tmp_path / "digits", split="0.8,0.2", progress=False)
    keys = [f"data.path={tmp_path / 'digits'}", "global_batch=256", "micro_batch=64"]
    with pytest.raises(UserError, match=r"has no split test; set data\.test=null to train without"):
        open_inputs(load_recipe("digits", keys))
    inputs = open_inputs(load_recipe("digits", [*keys, "data.test=null"]))
    assert list(inputs.splits) == ["train", "val"]
