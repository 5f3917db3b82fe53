"""Which members of an archive become samples, with which label; and what is said of the others."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.data.index import build_index, open_index
from bigbatch.data.samples import class_number, scan_shard
from tests.helpers.archives import pack


def pack_links(path: Path, *files: tuple[str, str, bytes]) -> Path:
    """(name, kind, data): kind is file, hard or symbolic; of links, data are the target."""
    kinds = {"file": tarfile.REGTYPE, "hard": tarfile.LNKTYPE, "symbolic": tarfile.SYMTYPE}
    with tarfile.open(path, "w") as tar:
        for name, kind, data in files:
            info = tarfile.TarInfo(name)
            info.type = kinds[kind]
            if kind == "file":
                info.size = len(data)
            else:
                info.linkname = data.decode()
            tar.addfile(info, io.BytesIO(data) if kind == "file" else None)
    return path


def image_of(path: Path, key: str) -> bytes:
    scan = scan_shard(path)
    place = scan.keys.index(key)
    return path.read_bytes()[scan.offsets[place] :][: scan.sizes[place]]


def test_labels_and_images_that_are_links(tmp_path: Path) -> None:
    """As GNU tar packs a folder in which equal files are hard links."""
    path = pack_links(
        tmp_path / "0.tar",
        ("./a.cls", "file", b"2"),
        ("./a.jpg", "file", b"A"),
        ("./b.cls", "hard", b"./a.cls"),
        ("./b.jpg", "file", b"B"),
        ("./d/c.cls", "symbolic", b"../a.cls"),
        ("./d/c.jpg", "symbolic", b"../later.jpg"),
        ("./d/e.cls", "symbolic", b"c.cls"),
        ("./d/e.jpg", "file", b"E"),
        ("./later.cls", "file", b"1"),
        ("./later.jpg", "file", b"L"),
    )
    scan = scan_shard(path)
    assert scan.problems == []
    labels = dict(zip(scan.keys, scan.labels, strict=True))
    assert labels == {"./a": 2, "./b": 2, "./d/c": 2, "./d/e": 2, "./later": 1}
    assert [image_of(path, key) for key in scan.keys] == [b"A", b"B", b"L", b"E", b"L"]
    index = build_index(tmp_path)  # compares the CRC of the first and of the last sample
    assert len(index) == 5


@pytest.mark.parametrize("target", ["nowhere.cls", "/etc/hostname", "../up.cls", "b.cls"])
def test_a_link_that_leads_nowhere_is_a_problem(tmp_path: Path, target: str) -> None:
    path = pack_links(
        tmp_path / "0.tar",
        ("a.jpg", "file", b"A"),
        ("a.cls", "symbolic", target.encode()),
        ("b.jpg", "file", b"B"),
        ("b.cls", "symbolic", b"a.cls" if target == "b.cls" else b"none"),
    )
    scan = scan_shard(path)
    assert scan.keys == []
    said = f"sample 'a' has a link .cls to {target!r}, which is no file of the archive"
    assert scan.problems[0] == ("0.tar at byte 512", said)


def test_a_link_to_a_name_that_occurs_twice_is_not_followed(tmp_path: Path) -> None:
    path = pack_links(
        tmp_path / "0.tar",
        ("a.cls", "file", b"0"),
        ("a.cls", "file", b"1"),
        ("b.jpg", "file", b"B"),
        ("b.cls", "hard", b"a.cls"),
    )
    assert [reason.partition(" to ")[0] for _, reason in scan_shard(path).problems] == [
        "sample 'a' has two .cls",
        "sample 'b' has a link .cls",
    ]


def test_longer_extensions(tmp_path: Path) -> None:
    path = pack(
        tmp_path / "0.tar",
        ("a.input.jpg", b"A"),
        ("a.cls", b"0"),
        ("photo.2.JPG", b"P"),
        ("photo.2.cls", b"1"),
        ("c.jpg", b"C"),
        ("c.seg.png", b"mask"),
        ("c.cls", b"2"),
        ("d.gif", b"D"),
        ("d.cls", b"0"),
        ("e.jfif", b"E"),
        ("e.cls", b"0"),
    )
    scan = scan_shard(path)
    assert scan.keys == ["a", "photo", "c", "d", "e"]
    assert scan.labels == [0, 1, 2, 0, 0]
    assert [image_of(path, key) for key in scan.keys] == [b"A", b"P", b"C", b"D", b"E"]
    assert scan.passed_over == {".png": 1}
    assert scan.problems == []
    assert len(build_index(tmp_path)) == 5


def test_several_images_of_one_key_are_a_problem(tmp_path: Path) -> None:
    dotted = [(f"photo.{i}.{part}", b"0") for i in range(24) for part in ("jpg", "cls")]
    pack(tmp_path / "0.tar", *dotted, ("z.jpg", b"Z"), ("z.cls", b"0"))
    with pytest.raises(UserError, match=r"sample 'photo' has 24 images .* first dot of the file"):
        build_index(tmp_path)


def test_a_label_without_an_image_is_a_problem(tmp_path: Path) -> None:
    pack(
        tmp_path / "0.tar",
        *(("a.jpg", b"A"), ("a.cls", b"0")),
        *(("b.heic", b"B"), ("b.cls", b"1")),
        *(("c.heic", b"C"), ("c.json", b'{"label": 1}')),
    )
    with pytest.raises(UserError) as error:
        build_index(tmp_path)
    assert "0.tar at byte 2,560: sample 'b' has a label and no image (only .cls, .heic)" in str(
        error.value
    )
    assert "sample 'c' has a label and no image (only .json, .heic)" in str(error.value)
    index = build_index(tmp_path, skip_bad=True)
    assert (index.keys(), len(index.problems)) == (["a"], 2)


def test_labels_apart_from_their_images(tmp_path: Path) -> None:
    images = [(f"k{i}.jpg", b"x") for i in range(3)]
    pack(tmp_path / "0.tar", *images, *((f"k{i}.cls", b"0") for i in range(3)))
    scan = scan_shard(tmp_path / "0.tar")
    assert len(scan.problems) == 3
    assert scan.problems[1] == (
        "0.tar at byte 1,536",
        "sample 'k1' has its label elsewhere in the archive; labels must stand beside their "
        "images: sort the members by name (tar --sort=name)",
    )


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    pack(
        tmp_path / "0.tar",
        *(("a.jpg", b"A"), ("a.txt", b"words"), ("a.cls", b"0")),
        *(("b.txt", b"words"), ("b.json", b'{"label": "ant"}')),
        *(("README", b"x"), ("d/.DS_Store", b"x"), ("__meta__/x.jpg", b"x")),
    )
    counts = {".txt": 2, ".json": 1, "without extension": 1, "hidden": 1, "__NAME__": 1}
    assert scan_shard(tmp_path / "0.tar").passed_over == counts
    for name in ("1.tgz", "0.parquet", "0_stats.json", "classes.txt"):
        (tmp_path / name).write_text("zero")
    pack(tmp_path / "more" / "1.tar", ("z.jpg", b"Z"))
    index = build_index(tmp_path)
    expected = {f"members {what}": count for what, count in counts.items()} | {
        "files .tgz": 1,
        "files .parquet": 1,
        "files .json": 1,
        "tars in more/": 1,
    }
    assert index.passed_over == expected
    assert open_index(tmp_path).passed_over == expected
    again = index.hash
    (tmp_path / "1.tgz").unlink()
    assert build_index(tmp_path).hash == again  # it says what the samples are


@pytest.mark.parametrize(
    ("cls", "record", "label"),
    [
        (b"3", None, 3),
        (b" 007\n", None, 7),
        (None, 3, 3),
        (b"3", 3, 3),
        (b"3", "ant", 3),
        (b"3", [1], 3),
        (b"3", -1, 3),
        (None, None, None),
    ],
)
def test_which_label_counts(cls: bytes | None, record: object, label: int | None) -> None:
    text = None if record is None else json.dumps({"label": record, "other": 5}).encode()
    assert class_number(cls, text) == label
    if text is not None:
        assert class_number(cls, text, "other") == 5


@pytest.mark.parametrize(
    ("cls", "record", "said"),
    [
        (b"1_0", None, r"no class number in .cls \(b'1_0'\)"),
        ("٣".encode(), None, "no class number in .cls"),
        (b"+3", None, "no class number in .cls"),
        (b"-1", None, "no class number in .cls"),
        (b"", None, "no class number in .cls"),
        (b"99999999999", None, "no class number in .cls"),
        (b"2147483648", None, "has label 2147483648; the limit is 2147483647"),
        (b"cat", 3, "no class number in .cls"),
        (None, "ant", r"no class number in .json \(label: 'ant'\)"),
        (None, True, "no class number in .json"),
        (None, 1.5, "no class number in .json"),
        (None, -1, "no class number in .json"),
        (b"0", 2, "has label 0 in .cls and 2 in .json"),
    ],
)
def test_labels_that_are_refused(cls: bytes | None, record: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        class_number(cls, None if record is None else json.dumps({"label": record}).encode())


@pytest.mark.parametrize("order", [("cls", "jpg", "json"), ("json", "jpg", "cls")])
def test_a_contradiction_is_found_in_any_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    parts = {"cls": b"0", "json": b'{"label": 2}', "jpg": b"x"}
    pack(tmp_path / "0.tar", *((f"k.{part}", parts[part]) for part in order))
    assert scan_shard(tmp_path / "0.tar").problems[0][1] == (
        "sample 'k' has label 0 in .cls and 2 in .json"
    )


def test_a_label_of_another_image_is_a_problem(tmp_path: Path) -> None:
    """p.1.jpg is of the key p, and would be lost; a mask or a second label is no image's."""
    masks = [(f"q.{part}", b"1") for part in ("jpg", "seg.png", "cls", "fine.cls")]
    more = [(f"p.{part}", b"1") for part in ("1.cls", "1.jpg", "cls", "jpg")]
    pack(tmp_path / "0.tar", *more, *masks)
    scan = scan_shard(tmp_path / "0.tar")
    assert scan.keys == ["q"]
    assert [what for _, what in scan.problems] == [
        "sample 'p' has a label of another image (of .1.jpg); a key ends at the first dot of the "
        "file name, so give each image its own, without a dot"
    ]
