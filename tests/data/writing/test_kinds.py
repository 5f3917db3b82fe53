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
from bigbatch.data.writing.kinds import open_source
from bigbatch.data.writing.shard import shard
from tests.helpers.archives import pack


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (9, 9), (number, 7, 7)).save(out, "JPEG")
    return out.getvalue()


def class_folders(root: Path) -> None:
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            (root / name / f"{i}.jpg").write_bytes(picture(i))


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
    for number in range(2):
        files, rows = [], []
        for i in range(6):
            key = f"{number:05d}{i:04d}"
            row = {"key": key, "label": i % 3, "fine": i % 2, "status": "success"}
            files += [(f"{key}.jpg", picture(i)), (f"{key}.txt", b"a photo")]
            files.append((f"{key}.json", json.dumps(row).encode()))
            rows.append(row)
        pack(tmp_path / f"{number:05d}.tar", *files)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{number:05d}.parquet")
        (tmp_path / f"{number:05d}_stats.json").write_text("{}")
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
        ("more.tar", "an archive of no split"),
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


def test_shards_may_be_written_below_a_folder_of_energon(prepared: Path) -> None:
    report = shard(str(prepared), prepared / "out", progress=False)
    assert report.samples == {"train": 6, "val": 3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("split_parts: 3", "cannot be read"),
        ("[", "cannot be read"),
        pytest.param("[" * 3_000, "cannot be read", id="deep"),
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


def test_a_stray_tar_among_images_without_extension_is_a_question(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "ant").mkdir(exist_ok=True)
        (tmp_path / "ant" / f"{i}").write_bytes(picture(i))
    (tmp_path / "ant" / "README").write_text("about ants")
    assert len(open_source(str(tmp_path)).keys) == 4
    pack(tmp_path / "old.tar", *samples(0, 3))
    with pytest.raises(UserError, match=r"1 tars \(old.tar\), 4 images in folders \(ant/0\)"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("imagenet-train-000000.tar", "imagenet-val-000000.tar"),
        ("data/train/0.tar", "data/validation/0.tar"),
        ("TRAIN_0.tar", "x.dev.tar"),
    ],
)
def test_splits_that_names_tell_are_kept(tmp_path: Path, train: str, val: str) -> None:
    pack(tmp_path / train, *samples(0, 3))
    assert open_source(str(tmp_path)).splits is None  # one alone may mean a locomotive
    pack(tmp_path / val, *samples(3, 5))
    pack(tmp_path / "more.tar", *samples(5, 6))
    source = open_source(str(tmp_path))
    assert source.splits is not None
    found = dict(zip(source.keys, source.splits.tolist(), strict=True))
    assert found == dict.fromkeys(("0000", "0001", "0002"), "train") | dict.fromkeys(
        ("0003", "0004"), "val"
    )
    assert source.skipped == [("more.tar", "an archive of no split")]


def test_keys_are_unique_in_a_split(tmp_path: Path) -> None:
    """Splits that number their samples each from 0; what is left out is named by its path."""
    for split, last in (("train", 6), ("val", 4), ("test", 2)):
        pack(tmp_path / "in" / split / "0.tar", *samples(0, last))
    pack(tmp_path / "in" / "val" / "1.tar", *samples(3, 5), ("x.jpg", picture(0)))
    pack(tmp_path / "in" / "train" / "1.tar", ("0006.cls", b"0"), ("0006.jpg", b"no image"))
    report = shard(str(tmp_path / "in"), tmp_path / "out", progress=False)
    assert report.samples == {"train": 6, "val": 5, "test": 2}
    unlabelled = "sample 'x' has no label (.cls, or .json with `label`)"
    assert report.skipped[:2] == [
        ("val/1.tar at byte 5,632", unlabelled),
        ("0003", "val/1.tar: has the key of an earlier sample"),
    ]
    assert [key for key, _ in report.skipped[2:]] == ["0006"]


def test_a_class_is_emptied_in_the_split_of_its_key(tmp_path: Path) -> None:
    pack(tmp_path / "in" / "train" / "0.tar", *samples(0, 3))
    broken = (("0002.cls", b"0"), ("0002.jpg", b"no image"))
    pack(tmp_path / "in" / "val" / "0.tar", *samples(0, 2), *broken)
    report = shard(str(tmp_path / "in"), tmp_path / "out", progress=False)
    assert report.samples == {"train": 3, "val": 2}
    assert not any("could be read" in note for note in report.notes)


def test_splits_number_the_classes_alike(tmp_path: Path) -> None:
    for split in ("test", "train", "val"):
        pack(tmp_path / split / "0.tar", *samples(0, 3))
    assert open_source(str(tmp_path)).classes == ("0", "1", "2")
    (tmp_path / "train" / "classes.txt").write_text("ant\nbee\ncow\n")
    assert open_source(str(tmp_path)).classes == ("ant", "bee", "cow")
    (tmp_path / "val" / "classes.txt").write_text("ant\nbee\ncow\n")
    assert open_source(str(tmp_path)).classes == ("ant", "bee", "cow")
    (tmp_path / "val" / "classes.txt").write_text("cow\nbee\nant\n")
    with pytest.raises(UserError, match=r"classes.txt of .*/train and of .*/val differ"):
        open_source(str(tmp_path))


def test_a_label_that_is_no_class_number(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", *samples(0, 3), ("z.jpg", picture(0)), ("z.cls", b"1999999999"))
    with pytest.raises(UserError, match=r"has label 1999999999; without a classes\.txt they are"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="beyond the 1,048,576 that there may be without a classes"):
        build_index(tmp_path)
    assert build_index(tmp_path, skip_bad=True).classes == ("0", "1", "2")


def test_classes_are_not_said_to_go_from_1_where_samples_were_left_out(tmp_path: Path) -> None:
    wrong = [("a.jpg", picture(0)), ("a.cls", b"0"), ("a.json", b'{"label": 1}')]
    good = [
        (f"{i}.{part}", data)
        for i in range(9)
        for part, data in (("jpg", picture(i)), ("cls", b"%d" % (1 + i % 2)))
    ]
    pack(tmp_path / "in" / "0.tar", *good)
    said = "1 of 3 classes have no sample: 0"
    report = shard(str(tmp_path / "in"), tmp_path / "one", progress=False)
    assert f"{said}; class numbers go from 0, do these go from 1?" in report.notes
    pack(tmp_path / "in" / "0.tar", *wrong, *good)
    report = shard(str(tmp_path / "in"), tmp_path / "two", progress=False)
    assert said in report.notes


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "state.json").write_text("[" * 200_000)
    assert len(open_source(str(tmp_path)).keys) == 20
