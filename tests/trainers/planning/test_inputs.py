from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.data.writing.shard import shard
from bigbatch.trainers.planning.inputs import momentum_schedule, open_inputs
from bigbatch.trainers.planning.plan import make_plan
from tests.helpers.micro_batches import image_bytes, write_shards


def test_a_data_set_without_a_test_split(tmp_path: Path) -> None:
    """It trains, and says what it will not report; a split of another name is missed."""
    shard("digits", tmp_path / "digits", split="0.8,0.2", progress=False)
    keys = [f"data.path={tmp_path / 'digits'}", "global_batch=256", "micro_batch=64"]
    usual = open_inputs(load_recipe("digits", keys))
    assert list(usual.splits) == ["train", "val"]
    assert usual.notes == (
        f"{tmp_path / 'digits'} has no split test: the run reports scores of val alone",
    )
    with pytest.raises(UserError, match=r"has no split exam, but train, val; set data\.test=null"):
        open_inputs(load_recipe("digits", [*keys, "data.test=exam"]))
    missing = r"has no split dev, but train, val; write it by `bigbatch shard SOURCE DEST --split"
    with pytest.raises(UserError, match=missing):
        open_inputs(load_recipe("digits", [*keys, "data.val=dev"]))
    with pytest.raises(UserError, match=r"has no split other, but train, val; name one of them"):
        open_inputs(load_recipe("digits", [*keys, "data.train=other"]))
    inputs = open_inputs(load_recipe("digits", [*keys, "data.test=null"]))
    assert list(inputs.splits) == ["train", "val"]
    assert inputs.notes == ()


def test_momentum_follows_its_own_schedule() -> None:
    rise = "{name: constant, warmup: 10 steps, warmup_start: 0.5}"
    keys = ["optimizer={name: sgd, lr: 0.1, momentum: 0.9}", "duration=20 steps"]
    recipe = load_recipe("digits", [*keys, f"optimizer.momentum_schedule={rise}"])
    momentum = momentum_schedule(recipe, make_plan(recipe, 1000))
    assert momentum is not None
    assert [momentum(s) for s in (0, 5, 10, 19)] == pytest.approx([0.45, 0.675, 0.9, 0.9])
    plain = load_recipe("digits", keys)
    assert momentum_schedule(plain, make_plan(plain, 1000)) is None
    for schedule, says in (
        ("{name: constant, warmup: 10 steps}", "the momentum of step 0 0; keep it above 0"),
        ("{name: piecewise_constant, boundaries: [5 steps], values: [1, 1.2]}", "of step 5 1.08"),
    ):
        recipe = load_recipe("digits", [*keys, f"optimizer.momentum_schedule={schedule}"])
        with pytest.raises(UserError, match=says):
            momentum_schedule(recipe, make_plan(recipe, 1000))
    with pytest.raises(UserError, match="momentum_schedule cannot hold a plateau"):
        load_recipe("digits", [*keys, "optimizer.momentum_schedule={name: plateau}"])
    with pytest.raises(UserError, match="multiplies a momentum of 0"):
        load_recipe(
            "digits", [*keys, "optimizer.momentum=0", f"optimizer.momentum_schedule={rise}"]
        )


def test_classes_that_nothing_measures_and_a_run_of_few_steps_are_said(tmp_path: Path) -> None:
    """`check` passed both without a word."""
    write_shards(tmp_path / "train", [(image_bytes(n), n % 4) for n in range(9)])
    write_shards(tmp_path / "val", [(image_bytes(9), 1), (image_bytes(10), 3)])
    keys = [f"data.path={tmp_path}", "global_batch=4", "micro_batch=4", "schedule={name: cosine}"]
    keys += ["data.sampling=uniform", "data.test=null"]
    missing = "split val has no sample of 0, 2: nothing is measured of these classes"
    few = (
        "duration 3 epochs is 7 steps in all: a smaller global_batch than 4, or a longer "
        "duration, makes more"
    )
    assert open_inputs(load_recipe("digits", [*keys, "duration=3 epochs"])).notes == (missing, few)
    for enough in ("duration=7 steps", "duration=60 epochs"):
        assert open_inputs(load_recipe("digits", [*keys, enough])).notes == (missing,)
