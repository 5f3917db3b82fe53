"""Numbers to learn, from a table's column or the JSON beside an image into shards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from bigbatch.configs.errors import UserError
from bigbatch.data.classes import UNLABELLED
from bigbatch.data.index import open_index
from bigbatch.data.writing.inspection import inspect
from bigbatch.data.writing.kinds import open_source
from bigbatch.data.writing.shard import shard
from bigbatch.launcher.cli.main import cli
from tests.data.writing.test_tables import picture
from tests.helpers.archives import pack


def table(path: Path, count: int = 40, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [picture(i) for i in range(count)], **columns}), path)
    return path


def by_row(root: Path) -> dict[int, tuple[int, list[float]]]:
    """Label and target of each row, from all splits."""
    found = {}
    for split in ("train", "val", "test"):
        index = open_index(root / split)
        assert index.target is not None
        rows = zip(index.keys(), index.label.tolist(), index.target.tolist(), strict=True)
        found |= {int(key): (label, target) for key, label, target in rows}
    return found


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_column_of_numbers_beside_labels(tmp_path: Path, workers: int) -> None:
    path = table(tmp_path / "t.parquet", age=[i / 8 for i in range(40)], label=[0, 1] * 20)
    report = shard(str(path), tmp_path / "d", target="age", samples_per_shard=8, workers=workers)
    assert sum(report.samples.values()) == 40
    assert by_row(tmp_path / "d") == {i: (i % 2, [i / 8]) for i in range(40)}
    found = inspect(tmp_path / "d")
    assert not found["problems"]
    assert found["splits"]["train"]["targets"][0]["max"] <= 39 / 8


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.int8(), 3)])
def test_lists_without_labels(tmp_path: Path, kind: pa.DataType) -> None:
    pose = pa.array([[i, -i, 2] for i in range(40)], kind)
    path = table(tmp_path / "t.parquet", target=pose)
    report = shard(str(path), tmp_path / "d", target="target")
    assert by_row(tmp_path / "d") == {i: (0, [i, -i, 2]) for i in range(40)}
    assert open_index(tmp_path / "d" / "train").classes == UNLABELLED
    assert not [note for note in report.notes if "one class" in note]
    # Nothing in the archives says a label that nobody gave.
    data = (tmp_path / "d" / "train" / "000000.tar").read_bytes()
    assert b".cls" not in data
    assert b".target.json" in data


def test_rows_without_a_target_are_left_out_by_name(tmp_path: Path) -> None:
    ages: list[Any] = [[float(i)] for i in range(40)]
    ages[3], ages[4], ages[5], ages[6] = None, [1.0, 2.0], [float("nan")], []
    path = table(tmp_path / "t.parquet", age=ages, label=[0, None, *[0, 1] * 19])
    report = shard(str(path), tmp_path / "d", target="age")
    assert by_row(tmp_path / "d").keys() == set(range(40)) - {1, 3, 4, 5, 6}
    assert sorted(report.skipped) == [
        ("t.parquet: row 1", "no label"),
        ("t.parquet: row 3", "no age"),
        ("t.parquet: row 4", "has a target of 2 numbers, others of 1"),
        ("t.parquet: row 5", "age: nan is not finite, or beyond what float32 holds"),
        ("t.parquet: row 6", "age: 0 numbers; give from 1 to 65,536"),
    ]


def test_tables_of_several_files(tmp_path: Path) -> None:
    for part in range(2):
        ages = [None if i == 2 else float(100 * part + i) for i in range(20)]
        table(tmp_path / "in" / f"part-{part}.parquet", 20, age=ages)
    source = open_source(str(tmp_path / "in"), target="age")
    assert source.targets is not None
    found = [np.frombuffer(numbers, np.float32)[0] for numbers in source.targets]
    assert found == [100 * part + i for part in range(2) for i in range(20) if i != 2]
    assert [what for what, _ in source.skipped] == [
        "part-0.parquet: row 2",
        "part-1.parquet: row 2",
    ]


@pytest.mark.parametrize(
    ("columns", "target", "message"),
    [
        ({"age": [1.0] * 40}, "ages", "has no column 'ages'; name one of image, age with --target"),
        ({"age": ["x"] * 40}, "age", "column age of t.parquet holds string, neither numbers"),
        ({"age": [None] * 40}, "age", "column age of t.parquet holds null, neither numbers"),
        ({"age": pa.array([None] * 40, pa.float32())}, "age", "no row has a target in column age"),
        ({"age": [[[1.0]]] * 40}, "age", r"holds list<.*>, neither numbers nor lists"),
    ],
)
def test_what_is_no_column_of_targets(
    tmp_path: Path, columns: dict[str, Any], target: str, message: str
) -> None:
    path = table(tmp_path / "t.parquet", **columns)
    with pytest.raises(UserError, match=message):
        open_source(str(path), target=target)


def test_sources_that_have_no_numbers_refuse(tmp_path: Path, photo_folder: Path) -> None:
    with pytest.raises(UserError, match="is a folder of images, which has no numbers"):
        open_source(str(photo_folder), target="age")
    with pytest.raises(UserError, match="digits have labels alone"):
        open_source("digits", target="age")


@pytest.mark.parametrize("key", [None, "age"])
def test_tars_keep_their_targets(tmp_path: Path, key: str | None) -> None:
    rows = []
    for i in range(40):
        age = json.dumps(i / 8).encode()
        text = age if key is None else b'{"age": %s}' % age
        rows += [(f"{i}.png", picture(i)), (f"{i}.json" if key else f"{i}.target.json", text)]
    rows += [("40.png", picture(40)), ("40.cls", b"0")]
    pack(tmp_path / "in" / "0.tar", *rows)
    report = shard(str(tmp_path / "in"), tmp_path / "d", target=key)
    assert by_row(tmp_path / "d") == {i: (0, [i / 8]) for i in range(40)}
    (left_out,) = [why for what, why in report.skipped if "no part of" not in why]
    assert "has no target" in left_out


def test_other_targets_are_another_plan(tmp_path: Path) -> None:
    """A killed `shard` of the same images goes on only with the same numbers."""
    path = table(tmp_path / "t.parquet", age=[float(i) for i in range(40)], size=[1.0, 2.0] * 20)
    (tmp_path / "d.partial").mkdir()
    shard(str(path), tmp_path / "d", target="age")
    (tmp_path / "d").rename(tmp_path / "done")
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "d.partial" / "plan.json").write_text('{"fingerprint": "another"}')
    with pytest.raises(UserError, match="was begun from another source"):
        shard(str(path), tmp_path / "d", target="size")


def test_the_commands_say_them(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", pose=[[i / 8, 1.0 - i] for i in range(40)])
    arguments = ["shard", str(path), str(tmp_path / "d"), "--target", "pose"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(cli, ["index", str(tmp_path / "d" / "train")])
    assert "32 samples of 1 class in 1 shard, with 2 targets each" in done.output
    assert "warning" not in done.output
    done = CliRunner().invoke(cli, ["inspect", str(tmp_path / "d")], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert "targets: least / mean / largest" in done.output
