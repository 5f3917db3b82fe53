import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from google_crc32c import value as crc32c

from bigbatch.configs.errors import UserError
from bigbatch.data.index import build_index, open_index
from tests.helpers.archives import pack


def sample(key: str, label: int, image: bytes = b"picture") -> tuple[tuple[str, bytes], ...]:
    return (f"{key}.jpg", image + key.encode()), (f"{key}.cls", str(label).encode())


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    """Four samples of classes 0, 2, 0, 1 in two shards."""
    pack(tmp_path / "0.tar", *sample("a", 0), *sample("b", 2))
    pack(tmp_path / "1.tar", *sample("c", 0), *sample("d", 1))
    return tmp_path


def test_columns_agree_with_tarfile(digits_root: Path) -> None:
    index = open_index(digits_root / "train")
    keys = index.keys()
    assert len(index) == len(keys) == len(set(keys)) == 1078
    row = 0
    for number, shard in enumerate(index.shards):
        path = index.root / shard.name
        assert path.stat().st_size == shard.bytes
        with tarfile.open(path) as tar:
            for image, label in zip(*[iter(tar)] * 2, strict=True):
                data = tar.extractfile(image).read()  # type: ignore[union-attr]
                assert image.name == f"{keys[row]}.png"
                assert label.name == f"{keys[row]}.cls"
                assert index.shard[row] == number
                assert index.offset[row] == image.offset_data
                assert index.size[row] == image.size
                assert index.crc[row] == crc32c(data)
                assert index.label[row] == int(tar.extractfile(label).read())  # type: ignore[union-attr]
                row += 1
    assert row == len(index)


def test_class_lists(digits_root: Path) -> None:
    index = open_index(digits_root / "train")
    assert index.class_counts.sum() == len(index)
    for c in range(10):
        members = index.class_members[index.class_starts[c] : index.class_starts[c + 1]]
        np.testing.assert_array_equal(members, np.flatnonzero(index.label == c))


def test_dtypes_and_mapping(digits_root: Path) -> None:
    index = open_index(digits_root / "train")
    columns = ("shard", "offset", "size", "label", "crc", "class_starts", "class_members")
    assert [str(getattr(index, c).dtype) for c in columns] == (
        ["uint32", "uint64", "uint32", "int32", "uint32", "int64", "uint32"]
    )
    assert all(isinstance(getattr(index, c).base, np.memmap) for c in columns)
    assert not index.label.flags.writeable


def test_foreign_archives(tmp_path: Path) -> None:
    """Other tools' conventions: json labels, folders in keys, further members, upper case."""
    pack(
        tmp_path / "x.tar",
        ("readme", b"no extension"),
        ("t/a.JPG", b"one"),
        ("t/a.json", b'{"label": 3, "caption": "x"}'),
        ("t/b.txt", b"caption"),
        ("t/b.json", b'{"width": 3}'),
        ("t/b.cls", b" 1\n"),
        ("t/b.seg.png", b"mask"),
        ("t/b.webp", b"two"),
        ("u/c.txt", b"a sample without an image"),
    )
    index = build_index(tmp_path)
    assert index.keys() == ["t/a", "t/b"]
    assert index.label.tolist() == [3, 1]
    assert index.size.tolist() == [3, 3]
    assert index.classes == ("0", "1", "2", "3")
    assert index.class_counts.tolist() == [0, 1, 0, 1]


def test_two_processes_give_the_same_index(digits_root: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_root / "train", tmp_path / "train", ignore=lambda *_: ["index"])
    index = build_index(tmp_path / "train", workers=2)
    assert index.hash == open_index(digits_root / "train").hash


def test_class_names(two_shards: Path) -> None:
    assert build_index(two_shards, classes=["x", "y", "z"]).classes == ("x", "y", "z")
    (two_shards / "classes.txt").write_text("ant\nbee\ncat\n")
    index = build_index(two_shards)
    assert index.classes == ("ant", "bee", "cat")
    assert index.class_counts.tolist() == [2, 1, 1]
    with pytest.raises(UserError, match=r"0.tar at byte 2,560: sample 'b' has label 2, beyond"):
        build_index(two_shards, classes=["x", "y"])


def test_hash_follows_content_alone(two_shards: Path, tmp_path: Path) -> None:
    first = build_index(two_shards).hash
    shutil.copytree(two_shards, tmp_path / "elsewhere")
    assert build_index(tmp_path / "elsewhere").hash == first
    pack(two_shards / "1.tar", *sample("c", 0), *sample("d", 2))
    assert build_index(two_shards).hash != first


FAULTS = {
    "unlabeled": ((*sample("c", 0), ("d.jpg", b"x")), "1.tar at byte 2,560: sample 'd' has no lab"),
    "no number": (
        (("c.jpg", b"x"), ("c.cls", b"cat"), *sample("d", 1)),
        r"1.tar at byte 512: sample 'c' has no class number in .cls \(b'cat'\)",
    ),
    "negative": (
        (("c.jpg", b"x"), ("c.cls", b"-1"), *sample("d", 1)),
        "1.tar at byte 512: sample 'c' has no class number",
    ),
    "two images": (
        (("c.jpg", b"x"), ("c.png", b"x"), ("c.cls", b"0"), *sample("d", 1)),
        "1.tar at byte 512: sample 'c' has two images",
    ),
    "duplicate": (
        (*sample("c", 0), *sample("a", 1)),
        "1.tar at byte 2,560: sample 'a' has the key of an earlier one",
    ),
    "duplicate in one shard": (
        (*sample("c", 0), *sample("e", 0), *sample("c", 1)),
        "1.tar at byte 4,608: sample 'c' has the key of an earlier one",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_samples_are_named_and_can_be_skipped(two_shards: Path, fault: str) -> None:
    build_index(two_shards)
    before = {p.name: p.read_bytes() for p in (two_shards / "index").iterdir()}
    files, message = FAULTS[fault]
    pack(two_shards / "1.tar", *files)
    with pytest.raises(UserError, match=message):
        build_index(two_shards)
    assert before == {p.name: p.read_bytes() for p in (two_shards / "index").iterdir()}
    assert not list(two_shards.glob("index.tmp-*"))

    index = build_index(two_shards, skip_bad=True)
    assert {"a", "b"} < set(index.keys()) <= {"a", "b", "c", "d", "e"}
    assert len(index.problems) == 1
    assert re.search(message, index.problems[0])


def test_damaged_archives(two_shards: Path) -> None:
    data = (two_shards / "1.tar").read_bytes()
    flipped = bytearray(data)
    flipped[2048] ^= 1  # the header of d.jpg
    for damaged, message in (
        (data[:2300], "1.tar at byte 2,048: the file ends without the end mark"),
        (data[:2600], "1.tar at byte 2,048: a member of 8 bytes reaches beyond the end of file"),
        (bytes(flipped), "1.tar at byte 2,048: invalid header"),
        (data[:-1024], "1.tar at byte 4,096: the file ends without the end mark"),
        (data + data, "1.tar at byte 4,096: data follow the end mark"),
    ):
        (two_shards / "1.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            build_index(two_shards)
        assert build_index(two_shards, skip_bad=True).keys()[:3] == ["a", "b", "c"]


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        build_index(tmp_path / "missing")
    with pytest.raises(UserError, match=r"holds no \*\.tar shards"):
        build_index(tmp_path)
    pack(tmp_path / "train" / "0.tar", ("a.txt", b"x"))
    with pytest.raises(UserError, match=r"did you mean .*train"):
        build_index(tmp_path)
    with pytest.raises(UserError, match="holds no sample"):
        build_index(tmp_path / "train")


def test_open_without_an_index_names_the_command(two_shards: Path) -> None:
    with pytest.raises(UserError, match="has no index; make it with `bigbatch index"):
        open_index(two_shards)
    (two_shards / "index.tmp-123").mkdir()  # what a killed `bigbatch index` leaves
    with pytest.raises(UserError, match="has no index"):
        open_index(two_shards)
    build_index(two_shards)
    assert not list(two_shards.glob("index.tmp-*"))
    assert len(open_index(two_shards)) == 4


def test_missing_and_changed_shards(two_shards: Path) -> None:
    build_index(two_shards)
    data = (two_shards / "1.tar").read_bytes()
    with (two_shards / "1.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"1.tar has 5,632 bytes; it had 5,120 .*`bigbatch index"):
        open_index(two_shards)
    (two_shards / "1.tar").unlink()
    with pytest.raises(UserError, match=r"1.tar cannot be read .* restore it"):
        open_index(two_shards)
    changed = bytearray(data)
    changed[int(open_offset(data, "d.jpg"))] ^= 1
    (two_shards / "1.tar").write_bytes(changed)
    with pytest.raises(UserError, match=r"1.tar at byte 2,560 is not what was indexed"):
        open_index(two_shards)


def open_offset(data: bytes, name: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmember(name).offset_data


def test_swapped_index_though_all_sizes_agree(tmp_path: Path) -> None:
    for split, keys in (("train", "abcd"), ("val", "efgh")):
        pack(tmp_path / split / "0.tar", *[f for k in keys for f in sample(k, 0)])
        build_index(tmp_path / split)
    shutil.rmtree(tmp_path / "val" / "index")
    shutil.copytree(tmp_path / "train" / "index", tmp_path / "val" / "index")
    with pytest.raises(UserError, match="not what was indexed: the index of another data set"):
        open_index(tmp_path / "val")


def test_damaged_index_files(two_shards: Path) -> None:
    build_index(two_shards)
    for path in sorted((two_shards / "index").iterdir()):
        if path.name == "keys.parquet":
            continue  # not used by training; reading it fails by itself
        data = path.read_bytes()
        for damaged in (
            data[:-3],
            b"",
            data[:-1] + bytes([data[-1] ^ 1]),
            data.replace(b"shape': (4,)", b"shape': (3,)").replace(
                b'"samples": 4', b'"samples": 3'
            ),
        ):
            if damaged == data:
                continue
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{path.name} is damaged"):
                open_index(two_shards)
        path.unlink()
        with pytest.raises(UserError, match=r"is damaged|has no index"):
            open_index(two_shards)
        path.write_bytes(data)
    assert len(open_index(two_shards)) == 4


def test_index_of_another_version(two_shards: Path) -> None:
    build_index(two_shards)
    path = two_shards / "index" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="has format 99; this version reads 1; make it again"):
        open_index(two_shards)


def test_reading_shards_needs_no_torch() -> None:
    code = (
        "import sys, bigbatch.data.writing.shard, bigbatch.data.index; "
        "import bigbatch.data.writing.inspection; "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "text", [b"\xef\xbb\xbfant\r\nbee\r\ncat\r\n", b"ant\nbee\ncat", b"ant\nbee\ncat\n\n"]
)
def test_classes_of_any_editor(two_shards: Path, text: bytes) -> None:
    (two_shards / "classes.txt").write_bytes(text)
    assert build_index(two_shards).classes == ("ant", "bee", "cat")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_classes_in_other_encodings_are_refused(two_shards: Path, encoding: str) -> None:
    (two_shards / "classes.txt").write_text("âne\nbœuf\nchat\n".replace("œ", "ö"), encoding)
    with pytest.raises(UserError, match=r"classes.txt is not UTF-8 .*; write it as UTF-8"):
        build_index(two_shards)


def test_shards_of_several_splits_are_no_index(two_shards: Path) -> None:
    (two_shards / "0.tar").rename(two_shards / "photos-train-0.tar")
    assert len(build_index(two_shards)) == 4
    (two_shards / "1.tar").rename(two_shards / "photos-val-0.tar")
    with pytest.raises(UserError, match=r"shards of several splits by their names \(train, val\)"):
        build_index(two_shards)


def test_a_hint_at_shards_in_capitals(two_shards: Path) -> None:
    (two_shards / "more").mkdir()
    for name in ("0", "1"):
        (two_shards / f"{name}.tar").rename(two_shards / "more" / f"{name}.TAR")
    with pytest.raises(UserError, match=r"holds no \*.tar shards; did you mean .*/more\?"):
        build_index(two_shards)
