"""Folders that hold several kinds of source, and those that other tools prepare."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.data.index import build_index
from bigbatch.data.tar import write_end, write_member
from bigbatch.data.writing.kinds import open_source


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (9, 9), (number, 7, 7)).save(out, "JPEG")
    return out.getvalue()


def class_folders(root: Path) -> None:
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            (root / name / f"{i}.jpg").write_bytes(picture(i))


def pack(path: Path, *files: tuple[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for name, data in files:
            write_member(file, name, data)
        write_end(file)


def samples(first: int, last: int) -> list[tuple[str, bytes]]:
    return [
        (f"{i:04d}.{part}", data)
        for i in range(first, last)
        for part, data in (("cls", b"%d" % (i % 3)), ("jpg", picture(i)))
    ]


def test_a_stray_tar_is_a_question(tmp_path: Path) -> None:
    class_folders(tmp_path)
    pack(tmp_path / "old.tar", *samples(0, 3))
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path))
    said = "holds 1 tars (old.tar), 20 images in folders (ant/0.jpg): which of them are the data?"
    assert said in str(error.value)
    assert "--kind tars or --kind images" in str(error.value)
    images = open_source(str(tmp_path), kind="images")
    assert len(images.keys) == 20
    assert [what for what, _ in images.skipped] == ["old.tar"]
    tars = open_source(str(tmp_path), kind="tars")
    assert len(tars.keys) == 3
    assert len(tars.skipped) == 20


def test_stray_tables_and_state_files(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "state.json").write_text('{"annotator": 3}')
    (tmp_path / "metadata.csv").write_text("file,note\n")
    source = open_source(str(tmp_path))
    assert len(source.keys) == 20
    assert [what for what, _ in source.skipped] == ["metadata.csv", "state.json"]
    pq.write_table(pa.table({"file": ["a"]}), tmp_path / "metadata.parquet")
    with pytest.raises(UserError, match=r"--kind parquet or --kind images"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), kind="images").keys) == 20


def test_img2dataset_is_read_as_tars(tmp_path: Path) -> None:
    """With a .parquet and a _stats.json beside each archive, and the label in KEY.json."""
    for shard in range(2):
        files, rows = [], []
        for i in range(6):
            key = f"{shard:05d}{i:04d}"
            row = {"key": key, "label": i % 3, "fine": i % 2, "status": "success"}
            files += [(f"{key}.jpg", picture(i)), (f"{key}.txt", b"a photo")]
            files.append((f"{key}.json", json.dumps(row).encode()))
            rows.append(row)
        pack(tmp_path / f"{shard:05d}.tar", *files)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{shard:05d}.parquet")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert source.labels.tolist() == [0, 1, 2] * 4
    assert source.skipped[-1] == ("12 members .txt", "no part of a sample")
    assert sorted(what for what, _ in source.skipped[:-1]) == [
        "00000.parquet",
        "00000_stats.json",
        "00001.parquet",
        "00001_stats.json",
    ]
    fine = open_source(str(tmp_path), label_column="fine")
    assert fine.labels.tolist() == [0, 1] * 6
    with pytest.raises(UserError, match=r"has no label \(\.json with `none`\)"):
        open_source(str(tmp_path), label_column="none")


def test_tars_outside_the_folders_of_splits_are_named(tmp_path: Path) -> None:
    pack(tmp_path / "train" / "0.tar", *samples(0, 3))
    pack(tmp_path / "val" / "0.TAR", *samples(3, 6))
    pack(tmp_path / "more.tar", *samples(6, 9))
    (tmp_path / "train" / "1.tgz").write_text("x")
    source = open_source(str(tmp_path))
    assert source.splits is not None
    assert source.splits.tolist() == ["train"] * 3 + ["val"] * 3
    assert source.skipped == [
        ("train/1.tgz", "no archive that is read (*.tar)"),
        ("more.tar", "an archive in no folder of a split"),
    ]


SPLIT = """
split_parts:
  train: ["shards/{0..1}.tar"]
  val: [shards/2.tar]
  test: []
exclude: [shards/3.tar]
"""


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """As megatron-energon's `energon prepare` leaves a data set."""
    for i in range(4):
        pack(tmp_path / "shards" / f"{i}.tar", *samples(3 * i, 3 * i + 3))
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta" / "split.yaml").write_text(SPLIT)
    return tmp_path


def test_the_split_of_energon_is_kept(prepared: Path) -> None:
    source = open_source(str(prepared))
    assert source.splits is not None
    assert source.splits.tolist() == ["train"] * 6 + ["val"] * 3
    assert ("shards/3.tar", "excluded by .nv-meta/split.yaml") in source.skipped


def test_the_split_of_energon_is_found_from_far_below(prepared: Path) -> None:
    text = SPLIT.replace("shards/", "shards/a/b/")
    (prepared / ".nv-meta" / "split.yaml").write_text(text)
    for i in range(4):
        (prepared / "shards" / "a" / "b").mkdir(parents=True, exist_ok=True)
        (prepared / "shards" / f"{i}.tar").rename(prepared / "shards" / "a" / "b" / f"{i}.tar")
    source = open_source(str(prepared / "shards"))
    assert source.splits is not None
    assert source.splits.tolist() == ["train"] * 6 + ["val"] * 3
    with pytest.raises(UserError, match="several parts"):
        build_index(prepared / "shards" / "a" / "b")


def test_an_index_over_parts_of_energon_is_refused(prepared: Path) -> None:
    with pytest.raises(UserError, match=r"several parts .* train \(2\), val \(1\), excluded \(1\)"):
        build_index(prepared / "shards")
    (prepared / "shards" / "2.tar").unlink()
    (prepared / "shards" / "3.tar").unlink()
    assert len(build_index(prepared / "shards")) == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("split_parts: 3", "cannot be read"),
        ("[", "cannot be read"),
        ("split_parts: {train: ['shards/{0..2}.tar']}", r"names no part for shards/3\.tar"),
        ("split_parts: {part7: ['shards/{0..3}.tar']}", "has a part 'part7'; known are train"),
        (
            "{split_parts: {train: ['shards/{0..3}.tar']}, exclude: [shards/0.tar/0001]}",
            "excludes single samples",
        ),
    ],
)
def test_a_split_of_energon_that_cannot_be_kept(prepared: Path, text: str, said: str) -> None:
    (prepared / ".nv-meta" / "split.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        open_source(str(prepared))
