import io
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.data.index import open_index
from bigbatch.data.writing.kinds import open_source
from bigbatch.data.writing.shard import shard
from bigbatch.data.writing.write import processes

NAMES = ["cat", "dog", "eel"]


def picture(i: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (20, 16), i % 256).save(file, "PNG" if i % 2 else "JPEG")
    return file.getvalue()


def hugging_face(rows: range) -> pa.Table:
    """The layout of `datasets`: struct images, and features in the schema's metadata."""
    images = [{"bytes": picture(i), "path": f"{i}.jpg"} for i in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    table = pa.table(
        {"image": pa.array(images, kind), "label": pa.array([i % 3 for i in rows], pa.int64())}
    )
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def test_hugging_face_parquet(tmp_path: Path) -> None:
    (tmp_path / "hf" / "data").mkdir(parents=True)
    (tmp_path / "hf" / "card.png").write_text("a picture for the page of the data set")
    for name, rows in (
        ("train-00000-of-00002", range(50)),
        ("train-00001-of-00002", range(50, 70)),
        ("validation-00000-of-00001", range(70, 80)),
    ):
        pq.write_table(
            hugging_face(rows), tmp_path / "hf" / "data" / f"{name}.parquet", row_group_size=7
        )
    source = open_source(str(tmp_path / "hf"))
    assert source.classes == tuple(NAMES)
    assert [source.read(i) for i in range(80)] == [picture(i) for i in range(80)]
    report = shard(str(tmp_path / "hf"), tmp_path / "d", samples_per_shard=16)
    assert report.samples == {"train": 70, "val": 10}
    index = open_index(tmp_path / "d" / "train")
    assert sorted(index.keys()) == [f"{i:08d}" for i in range(70)]
    assert all(label == int(k) % 3 for k, label in zip(index.keys(), index.label, strict=True))
    shard(str(tmp_path / "hf"), tmp_path / "two", samples_per_shard=16, workers=2)
    assert open_index(tmp_path / "two" / "train").hash == index.hash


def save(table: pa.Table, folder: Path) -> None:
    """What Dataset.save_to_disk of `datasets` 5.2 writes, in two files."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-00002.arrow" for n in range(2)]
    half = len(table) // 2
    for name, part in zip(names, (table[:half], table[half:]), strict=True):
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(part, max_chunksize=6)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_saved_datasets(tmp_path: Path) -> None:
    save(hugging_face(range(41)), tmp_path / "one")
    source = open_source(str(tmp_path / "one"))
    assert source.splits is None
    assert source.classes == tuple(NAMES)
    assert [source.read(i) for i in (40, 0, 21, 19)] == [picture(i) for i in (40, 0, 21, 19)]

    save(hugging_face(range(30)), tmp_path / "dict" / "train")
    save(hugging_face(range(30, 40)), tmp_path / "dict" / "test")
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    report = shard(str(tmp_path / "dict"), tmp_path / "d")
    assert report.samples == {"train": 27, "val": 3, "test": 10}

    (tmp_path / "one" / "state.json").write_text('{"_data_files": [], "_indices_data_files": [1]}')
    with pytest.raises(UserError, match="save it after flatten_indices"):
        open_source(str(tmp_path / "one"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        open_source(str(tmp_path / "one"))


def write(path: Path, **columns: Any) -> str:
    metadata = columns.pop("metadata", None)
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, path)
    return str(path)


def test_plain_columns(tmp_path: Path) -> None:
    images = [picture(i) for i in range(6)]
    path = write(
        tmp_path / "x.parquet",
        split=pa.array(["train"] * 4 + ["test", "valid"]).dictionary_encode(),
        label=pa.array([0, 1, 1, 0, 1, 0], pa.int8()),
        jpeg=images,
        metadata={"class_names": "ant,bee"},
    )
    source = open_source(path)
    assert source.classes == ("ant", "bee")
    assert source.splits is not None
    assert source.splits.tolist() == ["train"] * 4 + ["test", "val"]
    assert [source.read(i) for i in range(6)] == images


@pytest.mark.parametrize("held", [1, 128 << 20])  # row groups one at a time, or several
@pytest.mark.parametrize("dictionary", [False, True])
def test_rows_of_several_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int, dictionary: bool
) -> None:
    monkeypatch.setattr("bigbatch.data.writing.tables._HELD_BYTES", held)
    monkeypatch.setattr("bigbatch.data.writing.tables._BATCH_BYTES", 2_000)  # several batches each
    images = pa.array([picture(i % 40) + bytes(i) for i in range(100)])
    table = pa.table({"image": images.dictionary_encode() if dictionary else images})
    table = table.append_column("label", pa.array([i % 3 for i in range(100)]))
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=30)
    source = open_source(str(tmp_path / "x.parquet"))
    assert (source.window == 1) == (held == 1)
    order = np.random.default_rng(0).permutation(100).tolist()
    assert [source.read(i) for i in order] == [images[i].as_py() for i in order]


def test_labels_as_text_and_missing_labels(tmp_path: Path) -> None:
    images = [picture(i) for i in range(5)]
    path = write(tmp_path / "x.parquet", img=images, cls=["dog", "cat", None, "dog", "ant"])
    source = open_source(path)
    assert source.classes == ("ant", "cat", "dog")
    assert source.labels.tolist() == [2, 1, 2, 0]
    assert source.keys == ["00000000", "00000001", "00000003", "00000004"]
    assert source.read(2) == images[3]
    assert source.skipped == [("x.parquet: row 2", "no cls")]
    unsigned = pa.array([1, None, 0, 2, 1], pa.uint8())
    source = open_source(write(tmp_path / "y.parquet", img=images, label=unsigned))
    assert source.labels.tolist() == [1, 0, 2, 1]
    source = open_source(write(tmp_path / "z.parquet", img=images, label=[0, -1, 1, -1, 1]))
    assert source.labels.tolist() == [0, 1, 1]


def test_images_by_path_and_rows_without_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    images = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}, None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    source = open_source(
        write(tmp_path / "x.parquet", image=pa.array(images, kind), label=[0, 1, 0])
    )
    assert source.read(0) == picture(1)
    for row in (1, 2):
        with pytest.raises(OSError, match="no image in this row"):
            source.read(row)


def test_choice_of_columns(tmp_path: Path) -> None:
    images = [picture(i) for i in range(3)]
    path = write(tmp_path / "x.parquet", a=images, b=images, coarse=[0, 0, 1], fine=[2, 0, 1])
    with pytest.raises(UserError, match=r"no image column .* name one of a, b, coarse, fine with"):
        open_source(path)
    with pytest.raises(UserError, match="no label column that can be told by itself"):
        open_source(path, "a")
    with pytest.raises(UserError, match="no label column 'fin'; name one of"):
        open_source(path, "a", "fin")
    assert open_source(path, "b", "fine").labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0.5, 1.0]}, "column label holds double, not class numbers or names"),
        ({"label": [3, 2**40]}, "the highest value in column label is 1099511627776"),
        ({"label": [-1, -1]}, "no row has a label in column label"),
        (
            {"label": [0, 5], "metadata": {"class_names": "a,b"}},
            "class numbers here go from 0 to 1",
        ),
        ({"label": [0, 1], "split": ["train", "extra"]}, "has a split 'extra'; known are train"),
    ],
)
def test_bad_columns(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "x.parquet", jpeg=[picture(0), picture(1)], **columns)
    with pytest.raises(UserError, match=message):
        open_source(path)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", jpeg=[picture(0)], label=[0])
    write(tmp_path / "other.parquet", jpeg=[picture(0)], label=[0])
    with pytest.raises(UserError, match="some of its files belong to a split and some to none"):
        open_source(str(tmp_path))
    write(tmp_path / "other.parquet", image=[picture(0)], label=[0])
    with pytest.raises(UserError, match="give files with the same columns"):
        open_source(str(tmp_path))


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path / "x.parquet", jpeg=[rng.bytes(3000) for _ in range(9)], label=[0] * 9)
    source = open_source(path)
    data = bytearray(Path(path).read_bytes())
    data[4:40] = bytes(36)  # the header of the first page
    Path(path).write_bytes(data)
    with pytest.raises(OSError, match=r"x\.parquet, row group 0: "):
        source.read(0)


def named(path: Path, names: list[str] | None, labels: Any, first: int = 0) -> None:
    """A file whose row i shows picture(first + i); with ClassLabel names, or without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = None
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    write(
        path,
        image=[picture(first + i) for i in range(len(labels))],
        label=labels,
        metadata=metadata,
    )


def classes_of(root: Path) -> list[str]:
    source = open_source(str(root))
    assert [source.read(i) for i in range(len(source.keys))] == [
        picture(int(key)) for key in source.keys
    ]
    return [source.classes[label] for label in source.labels]


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_class_names_in_another_order_in_each_file(tmp_path: Path, form: str) -> None:
    orders = (NAMES, ["eel", "cat", "dog"], ["dog", "eel", "cat"])
    if form == "parquet":
        for i, names in enumerate(orders):
            named(tmp_path / f"train-{i}.parquet", names, [0, 1, 2], 3 * i)
    else:
        splits = ("train", "validation", "test")
        for i, (names, split) in enumerate(zip(orders, splits, strict=True)):
            table = hugging_face(range(3 * i, 3 * i + 3))
            features = {"label": {"names": names, "_type": "ClassLabel"}}
            noted = {"huggingface": json.dumps({"info": {"features": features}})}
            save(table.replace_schema_metadata(noted), tmp_path / split)
        (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    assert classes_of(tmp_path) == [name for names in orders for name in names]


def test_names_in_one_file_only(tmp_path: Path) -> None:
    named(tmp_path / "test-0.parquet", None, [2, 1])
    named(tmp_path / "train-0.parquet", NAMES, [0, 1, 2], 2)
    assert classes_of(tmp_path) == ["eel", "dog", "cat", "dog", "eel"]
    named(tmp_path / "test-0.parquet", None, [3, 1])
    with pytest.raises(
        UserError, match=r"test-0.parquet has the label 3, but train-0.parquet names"
    ):
        open_source(str(tmp_path))
    named(tmp_path / "test-0.parquet", None, [2, 1])
    named(tmp_path / "val-0.parquet", NAMES[::-1], [0])
    with pytest.raises(
        UserError, match=r"test-0.parquet has class numbers without names, and train-"
    ):
        open_source(str(tmp_path))


def test_other_classes_are_refused_with_both_files(tmp_path: Path) -> None:
    named(tmp_path / "train-0.parquet", NAMES, [0, 1, 2])
    named(tmp_path / "val-0.parquet", [*NAMES, "fox"], [3])
    with pytest.raises(
        UserError, match=r"train-0.parquet and val-0.parquet differ: .* names 'fox'"
    ):
        open_source(str(tmp_path))
    named(tmp_path / "val-0.parquet", None, ["fox"])
    with pytest.raises(
        UserError, match=r"val-0.parquet has the class 'fox', which train-0.parquet"
    ):
        open_source(str(tmp_path))
    named(tmp_path / "val-0.parquet", None, ["eel"], 3)  # text, by name
    assert classes_of(tmp_path) == [*NAMES, "eel"]
    named(tmp_path / "train-0.parquet", None, [0, 1, 2])
    with pytest.raises(
        UserError, match=r"holds names in val-0.parquet, but numbers without names in"
    ):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "files",
    [
        ("fine/train-00000-of-00001.parquet", "coarse/train-00000-of-00001.parquet"),
        ("fine/train/0000.parquet", "coarse/train/0000.parquet"),
        ("a/train.parquet", "b/train.parquet"),
        ("data/train-clean-00000-of-00001.parquet", "data/train-other-00000-of-00002.parquet"),
        ("train-00000-of-00001-aa.parquet", "train-00000-of-00001-bb.parquet"),
    ],
)
def test_two_tables_of_one_split_are_a_question(tmp_path: Path, files: tuple[str, str]) -> None:
    for file in files:
        named(tmp_path / file, NAMES, [0, 1, 2])
    with pytest.raises(UserError, match=r"two tables for the split train: ") as refused:
        open_source(str(tmp_path))
    assert all(file in str(refused.value) for file in files)


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (("TRAIN.PARQUET", "Test.Parquet"), ("train", "test")),
        (("train.parquet/part-0.snappy.parquet", "train.parquet/part-1.parquet"), ("train",) * 2),
        (("split=test/0.parquet", "split=train/0.parquet"), ("test", "train")),
        (("year=1/train-0.parquet", "year=2/train-0.parquet"), ("train",) * 2),
        (("default/partial-train/0000.parquet", "default/test/0000.parquet"), ("train", "test")),
        (("a/train-0.parquet", "b/train-1.parquet"), ("train",) * 2),
        (("train_a.parquet", "train_b.parquet"), ("train",) * 2),
        (("train-2024-01.parquet", "train-2024-02.parquet"), ("train",) * 2),
    ],
)
def test_layouts(tmp_path: Path, files: tuple[str, ...], splits: tuple[str, ...]) -> None:
    for i, file in enumerate(sorted(files)):
        named(tmp_path / file, NAMES, [0, 1, 2], 3 * i)
    (tmp_path / "_SUCCESS").touch()
    assert classes_of(tmp_path) == NAMES * 2
    found = open_source(str(tmp_path)).splits
    assert found is not None
    assert found.tolist() == [split for split in splits for _ in NAMES]


def test_what_is_passed_over_is_said(tmp_path: Path) -> None:
    named(tmp_path / "train-00001-of-00003.parquet", NAMES, [0, -1, None])
    named(tmp_path / "_temporary" / "x.parquet", NAMES, [0])
    source = open_source(str(tmp_path))
    assert source.skipped == [
        ("train-00001-of-00003.parquet: rows 1, 2", "no label"),
        ("_temporary/x.parquet", "its name begins with _"),
        ("train", "2 of 3 files missing"),
    ]


@pytest.mark.parametrize("one", [pa.int32(), pa.uint8(), pa.int64()])
def test_other_integers_and_texts_beside_each_other(tmp_path: Path, one: pa.DataType) -> None:
    named(tmp_path / "train-0.parquet", None, pa.array([0, 1, 2], pa.int64()))
    named(tmp_path / "test-0.parquet", None, pa.array([2], one), 3)
    source = open_source(str(tmp_path))
    assert source.labels.tolist() == [2, 0, 1, 2]
    named(tmp_path / "train-0.parquet", None, pa.array(NAMES, pa.string()), 1)
    texts = (pa.array(["eel"], pa.large_string()), pa.array(["eel"]).dictionary_encode())
    for text in (*texts, pa.array(["eel"], pa.string_view())):
        named(tmp_path / "test-0.parquet", None, text)
        assert classes_of(tmp_path) == ["eel", *NAMES]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    named(tmp_path / "train-0.parquet", NAMES, [0, 1, 2])
    whole = (tmp_path / "train-0.parquet").read_bytes()
    (tmp_path / "train-1.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*/train-1.parquet: .* may be cut short"):
        open_source(str(tmp_path))
    (tmp_path / "train-1.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"train-1.parquet is a Git LFS pointer, .* `git lfs pull`"):
        open_source(str(tmp_path))
    save(hugging_face(range(4)), tmp_path / "saved")
    (tmp_path / "saved" / "data-00001-of-00002.arrow").write_bytes(b"ARROW")
    with pytest.raises(UserError, match=r"cannot read .*data-00001-of-00002.arrow"):
        open_source(str(tmp_path / "saved"))


@pytest.mark.parametrize("noted", ["{", "[]", '{"info": {"features": [1]}}', "[" * 100_000])
def test_damaged_metadata_is_one_message(tmp_path: Path, noted: str) -> None:
    path = write(
        tmp_path / "x.parquet", image=[picture(0)], label=[0], metadata={"huggingface": noted}
    )
    with pytest.raises(UserError, match=r"metadata `huggingface` of x.parquet cannot be read"):
        open_source(path)


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.png", "a/../../secret.png"])
def test_rows_do_not_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(picture(1))
    (tmp_path / "set").mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": name}], kind)
    source = open_source(write(tmp_path / "set" / "x.parquet", image=rows, label=[0]))
    with pytest.raises(OSError, match="does not lie beside or below its table"):
        source.read(0)
    for file in ("../x.arrow", "/etc/x.arrow", "", ".."):
        save(hugging_face(range(4)), tmp_path / "saved") if file == "../x.arrow" else None
        state = {"_data_files": [{"filename": file}]}
        (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match="lists no names of files beside it"):
            open_source(str(tmp_path / "saved"))


def test_a_reader_takes_nothing_along_to_another_process(tmp_path: Path) -> None:
    images = [bytes(100_000) for _ in range(20)]
    path = write(tmp_path / "x.parquet", image=images, label=[0] * 20)
    source = open_source(path)
    source.read(0)
    assert len(pickle.dumps(source)) < 100_000


def test_all_processes_together_are_bounded(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "x.parquet", image=[picture(0)], label=[0]))
    assert source.held == 128 << 20
    assert [processes(source, n) for n in (1, 8, 1000)] == [1, 8, 29]
    large = replace(source, held=int(3.2 * 100e6))
    assert processes(large, 1000) == 17
    assert 17 * (large.held + (150 << 20)) <= 8 << 30
    assert processes(replace(source, held=100 << 30), 1000) == 1
    assert processes(replace(source, held=0), 1000) == 1000


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "snappy"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_memory_of_row_groups(tmp_path: Path, compression: str, dictionary: bool) -> None:
    """100 MB row groups: a process takes at most 3.2 times that, and 32 MB for all else.

    Beside what its libraries take, which differs between machines (here 130 MB). pyarrow makes a
    dictionary of all images in a group of up to 1,024 rows, unless told not to.
    """
    rng = np.random.default_rng(0)
    path = tmp_path / "x.parquet"
    writer = None
    for _ in range(3):
        file = io.BytesIO()
        rows = []
        for _ in range(1000):
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (183, 183, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "BMP")
            rows.append(file.getvalue())
        table = pa.table({"image": rows, "label": [i % 3 for i in range(1000)]})
        writer = writer or pq.ParquetWriter(
            path, table.schema, use_dictionary=dictionary, compression=compression
        )
        writer.write_table(table, row_group_size=1000)
    assert writer is not None
    writer.close()
    code = (
        "import re, sys; from pathlib import Path; "
        "from bigbatch.data.writing.shard import shard; "
        "status = Path('/proc/self/status').read_text; "
        "peak = lambda: print(re.search(r'VmHWM:\\s+(\\d+)', status())[1]); "
        "peak(); shard(sys.argv[1], Path(sys.argv[2]), progress=False); peak()"
    )
    # Not ru_maxrss, which a process inherits from the one that started it.
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "d")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    libraries, peak = (int(line) * 1024 for line in done.stdout.split())
    group = pq.read_metadata(path).row_group(0).total_byte_size
    assert 100e6 < group < 102e6
    assert peak - libraries < 3.2 * group + (32 << 20)


@pytest.mark.skipif("BIGBATCH_CIFAR10" not in os.environ, reason="BIGBATCH_CIFAR10 names no file")
def test_cifar10(tmp_path: Path) -> None:
    report = shard(os.environ["BIGBATCH_CIFAR10"], tmp_path / "d", shard_size="16MB")
    assert report.samples == {"train": 45_000, "val": 5_000, "test": 10_000}
    assert report.skipped == []
    for split, count in (("train", 4500), ("val", 500), ("test", 1000)):
        index = open_index(tmp_path / "d" / split)
        assert index.class_counts.tolist() == [count] * 10
        assert index.classes[6] == "frog"


def test_tables_in_linked_folders_are_read(tmp_path: Path) -> None:
    named(tmp_path / "set" / "train" / "0.parquet", NAMES, [0, 1, 2])
    named(tmp_path / "elsewhere" / "0.parquet", NAMES, [2], 3)
    named(tmp_path / "set" / "train" / "@eaDir" / "0.parquet", NAMES, [0])
    (tmp_path / "set" / "val").symlink_to("../elsewhere")
    (tmp_path / "set" / "train" / "loop").symlink_to("..")
    source = open_source(str(tmp_path / "set"))
    assert source.labels.tolist() == [0, 1, 2, 2]
    assert source.splits is not None
    assert source.splits.tolist() == ["train"] * 3 + ["val"]
    assert source.skipped == [
        ("train/@eaDir/", "hidden folder"),
        ("train/loop/", "a link to a folder that is read already"),
    ]


def test_splits_in_the_middle_of_names(tmp_path: Path) -> None:
    named(tmp_path / "cifar-train.parquet", NAMES, [0, 1, 2])
    assert open_source(str(tmp_path)).splits is None
    named(tmp_path / "cifar-test.parquet", NAMES, [0], 3)
    source = open_source(str(tmp_path))
    assert source.splits is not None
    assert source.splits.tolist() == ["test"] + ["train"] * 3
    named(tmp_path / "fine" / "cifar-train.parquet", NAMES, [0], 4)
    with pytest.raises(UserError, match="two tables for the split train"):
        open_source(str(tmp_path))


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    named(tmp_path / "a.parquet", NAMES, [0, 1, 2])
    (tmp_path / "a.parquet").rename(tmp_path / "\udcff.parquet")
    with pytest.raises(UserError, match=r"the name .*/\ufffd.parquet is not UTF-8; rename it"):
        open_source(str(tmp_path))
