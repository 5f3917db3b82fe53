"""What `predict` takes: shards, tars, folders and lists, labelled or not."""

import io
from pathlib import Path

import pytest
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.data.batch import Decoding
from bigbatch.data.index import build_index
from bigbatch.data.listing import Listing, open_listing
from bigbatch.data.loader import eval_batches
from tests.helpers.archives import pack

CLASSES = ("cat", "dog", "owl")
DECODING = Decoding(image_size=8, channels=3, workers=0, threads=1)


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def read(listing: Listing, batch: int = 3) -> dict[str, int | str]:
    """By key: the pixels' value, or why there are none."""
    found: dict[str, int | str] = {}
    for each in eval_batches(
        listing.index, DECODING, batch=batch, rank=0, world=1, leave_out_bad=True
    ):
        for sample, image in zip(each.samples.tolist(), each.images(), strict=True):
            assert image.unique().numel() == 1
            found[listing.keys[sample]] = int(image[0, 0, 0])
        for entry in each.bad:
            found[listing.keys[entry["sample"]]] = entry["reason"]
    return found


def write(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(10 * number))
    return root


def test_a_folder_gives_labels_by_the_topmost_folder_that_is_a_class(tmp_path: Path) -> None:
    names = ("a.png", "cat/1.png", "cat/dog/2.jpg", "new/3.png", "new/owl/4.png")
    listing = open_listing(str(write(tmp_path, *names)), CLASSES)
    assert listing.keys == list(names)
    assert listing.index.label.tolist() == [-1, 0, 0, -1, 2]
    assert read(listing) == {name: 10 * i for i, name in enumerate(names)}
    (tmp_path / "notes.md").write_text("")
    assert "passed over notes.md" in open_listing(str(tmp_path), CLASSES).notes[0]


def test_what_cannot_be_read_is_kept_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png", "f.png")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(picture(0)[:40])
    (tmp_path / "d.png").unlink()
    (tmp_path / "d.png").symlink_to("nowhere")
    listing = open_listing(str(tmp_path), CLASSES)
    (tmp_path / "e.png").unlink()  # between listing and reading
    for batch in (1, 3, 6):
        found = read(listing, batch)
        assert sorted(found) == [f"{name}.png" for name in "abcdef"]
        assert (found["a.png"], found["f.png"]) == (0, 50)
        assert all(isinstance(found[f"{name}.png"], str) for name in "bcde")
        assert found["e.png"] == "cannot be read: No such file or directory"


def test_a_list_is_read_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "p", "x y.png", "z.png")
    monkeypatch.chdir(tmp_path)
    text = f"p/x y.png\r\n\n{tmp_path}/p/z.png\nmissing.png\nnul\0.png\n"
    Path("list.txt").write_text(text)
    listing = open_listing("list.txt", CLASSES)
    assert listing.keys == ["p/x y.png", f"{tmp_path}/p/z.png", "missing.png"]
    assert listing.unreadable == [("nul_.png", "no file can have this name")]
    assert (listing.index.label == -1).all()
    values = list(read(listing).values())
    assert values[0] == 0
    assert values[1] == 10
    assert str(values[2]).startswith("cannot be read")
    assert open_listing("p/z.png", CLASSES).keys == ["z.png"]


def test_tars_without_labels_or_with_some(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", ("a.png", picture(1)), ("b.png", picture(2)), ("b.cls", b"1"))
    pack(tmp_path / "1.tar", ("c.png", picture(3)), ("c.cls", b"what"), ("d.txt", b""))
    (tmp_path / "classes.txt").write_text("dog\nowl\n")
    listing = open_listing(str(tmp_path), CLASSES)
    assert listing.keys == ["a", "b", "c"]
    assert listing.index.label.tolist() == [-1, CLASSES.index("owl"), -1]
    assert read(listing) == {"a": 1, "b": 2, "c": 3}
    assert any("members labels that are none" in note for note in listing.notes)
    one = open_listing(str(tmp_path / "1.tar"), CLASSES)
    assert one.keys == ["c"]


def test_numbers_are_no_classes_by_name_unless_the_model_was_trained_on_numbers(
    tmp_path: Path,
) -> None:
    pack(tmp_path / "0.tar", ("a.png", picture(1)), ("a.cls", b"1"))
    unknown = open_listing(str(tmp_path), CLASSES)
    assert unknown.index.label.tolist() == [-1]
    assert "none of the model's (1)" in unknown.notes[0]
    assert open_listing(str(tmp_path), ("0", "1", "2")).index.label.tolist() == [1]


def test_keys_that_repeat_get_their_archive(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", ("a.png", picture(1)), ("two.png", picture(1)), ("two.jpg", b""))
    pack(tmp_path / "1.tar", ("a.png", picture(2)))
    listing = open_listing(str(tmp_path), CLASSES)
    assert listing.keys == ["0.tar/a", "1.tar/a"]
    assert len(listing.unreadable) == 1
    assert "two images" in listing.unreadable[0][1]


def test_shards_with_an_index_map_their_classes_by_name(tmp_path: Path) -> None:
    shards = tmp_path / "val"
    files = [
        (f"{i}.{e}", d) for i in range(3) for e, d in (("png", picture(i)), ("cls", b"%d" % i))
    ]
    pack(shards / "0.tar", *files)
    build_index(shards, classes=("owl", "dog", "cat"))
    listing = open_listing(str(shards), CLASSES)
    assert listing.index.label.tolist() == [2, 1, 0]
    assert "by their names" in listing.notes[0]
    build_index(shards, classes=("owl", "dog", "bird"))
    some = open_listing(str(shards), CLASSES)
    assert some.index.label.tolist() == [2, 1, -1]
    assert "1 of its classes are none of the model's (bird); their 1 images" in some.notes[0]
    with pytest.raises(UserError, match="holds the splits val; give one of them"):
        open_listing(str(tmp_path), CLASSES)


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "list.txt").write_text("\n")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("a.csv", "neither an image"),
        ("list.txt", "lists no image"),
        ("empty", "holds no image"),
        ("gone", "no source"),
    ):
        with pytest.raises(UserError, match=message):
            open_listing(str(tmp_path / name), CLASSES)


def test_every_batch_size_gives_every_image_once(tmp_path: Path) -> None:
    write(tmp_path, *(f"{i:02d}.png" for i in range(11)))
    (tmp_path / "04.png").write_bytes(b"no image")
    (tmp_path / "10.png").write_bytes(b"no image")
    listing = open_listing(str(tmp_path), CLASSES)
    expected = read(listing, 11)
    assert len(expected) == 11
    for batch in range(1, 11):
        assert read(listing, batch) == expected


def test_what_lies_beside_archives_is_said(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", ("a.png", picture(1)))
    assert open_listing(str(tmp_path), CLASSES).notes == []
    write(tmp_path, "beside.png", "below/c.png")
    pack(tmp_path / "below" / "1.tar", ("d.png", picture(4)))
    images, archives = open_listing(str(tmp_path), CLASSES).notes
    assert "2 images beside its archives are passed over, such as below/c.png" in images
    assert "1 archives below it are passed over, such as below/1.tar" in archives
    assert open_listing(str(tmp_path / "0.tar"), CLASSES).notes == []


def test_a_class_may_be_named_index(tmp_path: Path) -> None:
    write(tmp_path, "index/a.png", "thumb/b.png")
    assert open_listing(str(tmp_path), ("index", "thumb")).index.label.tolist() == [0, 1]
    write(tmp_path / "left", "index/a.png")
    assert len(open_listing(str(tmp_path), ("index", "thumb")).keys) == 3


def test_a_label_beyond_all_classes_is_refused_before_memory_is_spent_on_names(
    tmp_path: Path,
) -> None:
    pack(tmp_path / "0.tar", ("a.png", picture(1)), ("a.cls", b"2000000000"))
    with pytest.raises(UserError, match="label 2000000000, beyond 1,048,576 classes without a"):
        open_listing(str(tmp_path), CLASSES)
    (tmp_path / "classes.txt").write_text("dog\nowl\n")
    with pytest.raises(UserError, match=r"label 2000000000, beyond 2 in its classes\.txt"):
        open_listing(str(tmp_path), CLASSES)
