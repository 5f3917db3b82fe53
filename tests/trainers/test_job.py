"""What a rank checks before it trains with the others."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.load import load_recipe
from bigbatch.configs.rundir import RunDir, create_run
from bigbatch.data.batch import Decoding
from bigbatch.data.geometry import View
from bigbatch.trainers.job import Job, check_same_data
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


@pytest.mark.parametrize(("teacher", "size"), [(None, 32), (48, 48), (32, 32)])
def test_images_are_decoded_for_the_largest_of_student_and_teacher(
    digits: Path, monkeypatch: pytest.MonkeyPatch, teacher: int | None, size: int
) -> None:
    """Of the same crops: a view's boxes do not depend on its size."""
    made: list[Decoding] = []
    monkeypatch.setattr(
        "bigbatch.trainers.job.train_batches", lambda *parts: iter(made.append(parts[-1]) or ())
    )
    recipe = load_recipe("digits", [f"data.path={digits}", "augment.crop={}"])
    growth = ((0, 16), (3, 32))  # of the student alone
    view = View(32, 1.0, recipe.augment.crop, seed=recipe.seed, growth=growth)
    nothing: Any = SimpleNamespace()
    cpu = SimpleNamespace(rank=0, world=1, device=SimpleNamespace(type="cpu"))
    job = Job(
        RunDir(Path("none")), recipe, cast(Any, cpu), open_inputs(recipe), nothing, nothing,
        cast(Any, SimpleNamespace(view=view)), nothing, nothing, nothing,
        None if teacher is None else cast(Any, SimpleNamespace(decoded_size=teacher)),
    )  # fmt: skip
    assert list(job.batches(0, 1)) == []
    (decoding,) = made
    assert decoding.view is not None
    assert (decoding.image_size, decoding.view.out) == (size, size)
    assert decoding.view.at(0).out == (16 if teacher is None else size)
    sizes = np.array([[8, 8], [30, 20]])
    np.testing.assert_array_equal(decoding.view.boxes(sizes, 3, 1), view.boxes(sizes, 3, 1))


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


@pytest.mark.parametrize("place", ["folder", "line"])
def test_a_trace_that_the_disk_refuses_ends_no_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    batches = [SimpleNamespace(step=s, index=0, samples=np.arange(4)) for s in range(3)]
    job = SimpleNamespace(
        recipe=load_recipe("digits", ["log.trace=true"]),
        run=RunDir(tmp_path),
        engine=SimpleNamespace(rank=0),
        batches=lambda start, stop: iter(batches),
    )

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "folder":
        (tmp_path / "trace").write_text("")
    else:
        monkeypatch.setattr(os, "write", full)
    assert list(Job.traced_batches(job, 0, 3)) == batches  # type: ignore[arg-type]
    assert "trace" in capsys.readouterr().err
