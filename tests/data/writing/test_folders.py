"""Folders of images as people and systems leave them."""

from pathlib import Path

import pytest
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.data.index import open_index
from bigbatch.data.writing.folders import image_folder
from bigbatch.data.writing.inspection import inspect
from bigbatch.data.writing.shard import shard
from bigbatch.data.writing.skips import count_skips, describe
from bigbatch.data.writing.tree import walk


def save(path: Path, form: str = "JPEG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    number = sum(map(ord, str(path)))
    Image.new("RGB", (9, 9), (number % 256, 7, 7)).save(path, form)


def test_hidden_folders_are_passed_over_and_named(tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / "bee" / f"{i}.jpg")
        save(tmp_path / "bee" / ".ipynb_checkpoints" / f"{i}-checkpoint.jpg")
    save(tmp_path / "bee" / "@eaDir" / "0.jpg" / "SYNOPHOTO_THUMB_M.jpg")
    save(tmp_path / "cow" / ".hidden.jpg")
    source = image_folder(tmp_path)
    assert len(source.keys) == 20
    assert source.skipped == [
        ("bee/.ipynb_checkpoints/", "hidden folder"),
        ("bee/@eaDir/", "hidden folder"),
        ("cow/.hidden.jpg", "hidden file"),
        ("cow/", "a class folder without an image"),
    ]


def test_extensions(tmp_path: Path) -> None:
    """What Pillow reads is read; what is passed over is counted, also when it is a class."""
    for i in range(3):
        save(tmp_path / "ant" / f"{i}.jpg")
        save(tmp_path / "elk" / f"{i}")  # no extension
        save(tmp_path / "gnu" / f"{i}.gif", "GIF")
        save(tmp_path / "hen" / f"{i}.jfif")
        save(tmp_path / "yak" / f"{i}.JPE")
        (tmp_path / "emu").mkdir(exist_ok=True)
        (tmp_path / "emu" / f"{i}.heic").write_text("x")
    (tmp_path / "ant" / "README").write_text("x")
    source = image_folder(tmp_path)
    assert source.classes == ("ant", "elk", "gnu", "hen", "yak")
    assert source.labels.tolist() == [c for c in range(5) for _ in range(3)]
    rows = count_skips(source.skipped)
    assert [(row["count"], row["extension"], row["first"]) for row in rows] == [
        (3, ".heic", "emu/0.heic"),
        (1, "", "ant/README"),
        (1, "", "emu/"),
    ]
    line = "3 (.heic): not the extension of an image that is read; first emu/0.heic"
    assert describe(rows[0]) == line
    assert describe(rows[2]) == "emu/: a class folder without an image"


def test_skips_are_in_skipped_txt_and_in_inspect(tmp_path: Path) -> None:
    for i in range(10):
        save(tmp_path / "in" / "ant" / f"{i}.jpg")
        save(tmp_path / "in" / "bee" / f"{i}.jpg")
        (tmp_path / "in" / "bee" / f"{i}.xml").write_text("x")
    (tmp_path / "in" / "cow").mkdir()
    (tmp_path / "in" / "cow" / "1.jpg").write_text("no image")
    report = shard(str(tmp_path / "in"), tmp_path / "out", progress=False)
    assert report.notes[-1] == "classes of which no image could be read: cow"
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert len(lines) == len(report.skipped) == 11
    found = inspect(tmp_path / "out")
    assert [(row["count"], row["extension"]) for row in found["left_out"]] == [
        (10, ".xml"),
        (1, ""),
    ]
    assert inspect(tmp_path / "out" / "val")["left_out"] == found["left_out"]
    assert found["notes"] == ["classes without a sample in any split: cow"]
    assert found["problems"] == []


def test_no_folder_is_read_twice(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "ant" / f"{i}.jpg")
    (tmp_path / "ant" / "again").symlink_to(".")
    (tmp_path / "ant" / "up").symlink_to("..")
    save(tmp_path / "bee" / "1.jpg")
    (tmp_path / "ant" / "bees").symlink_to("../bee")
    (tmp_path / "aaa").symlink_to("ant")  # met before its target
    (tmp_path / "bee" / "self.jpg").symlink_to("self.jpg")
    tree = walk(tmp_path)
    linked = "a link to a folder that is read already"
    assert tree.skipped == [
        (name, linked) for name in ("aaa/", "ant/again/", "ant/bees/", "ant/up/")
    ]
    source = image_folder(tmp_path, tree)
    assert source.keys == [*(f"ant/{i}" for i in range(6)), "bee/1", "bee/self"]


def test_links_out_of_the_tree_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "store" / "x7" / "1.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "ant").symlink_to("../store/x7")
    source = image_folder(tmp_path / "set")
    assert (source.keys, source.classes) == (["ant/1"], ("ant",))


def test_splits_below_classes_are_kept(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        for split in ("train", "val"):
            for i in range(3):
                save(tmp_path / name / split / f"{i}.jpg")
    source = image_folder(tmp_path)
    assert source.classes == ("ant", "bee")
    assert source.splits is not None
    assert source.splits.tolist() == (["train"] * 3 + ["val"] * 3) * 2
    save(tmp_path / "bee" / "loose.jpg")
    with pytest.raises(UserError, match=r"some images lie in splits below their class \(ant/train"):
        image_folder(tmp_path)


def test_a_folder_called_train_may_be_a_train(tmp_path: Path) -> None:
    save(tmp_path / "vehicle" / "train" / "1.jpg")
    save(tmp_path / "vehicle" / "car" / "1.jpg")
    assert image_folder(tmp_path).splits is None


def test_a_split_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / "in" / "train" / "ant" / f"{i}.jpg")
        save(tmp_path / "in" / "val" / "ant" / f"{i}.jpg")
    (tmp_path / "in" / "test" / "ant").mkdir(parents=True)
    (tmp_path / "in" / "test" / "ant" / "1.jpg").write_text("no image")
    report = shard(str(tmp_path / "in"), tmp_path / "out", progress=False)
    assert report.samples == {"train": 4, "val": 4}
    assert "no image of the test split could be read; it is left out" in report.notes
    assert not (tmp_path / "out" / "test").exists()


def test_a_class_that_readers_take_for_no_samples_gets_other_keys(tmp_path: Path) -> None:
    """WebDataset passes over members that begin as __NAME__/ does."""
    for i in range(3):
        save(tmp_path / "in" / "__background__" / f"{i}.jpg")
        save(tmp_path / "in" / "__init" / f"{i}.jpg")
    save(tmp_path / "in" / "\x01_bell__" / "0.jpg")  # keys have _ for control characters
    report = shard(str(tmp_path / "in"), tmp_path / "out", split="1", progress=False)
    assert report.samples == {"train": 7}
    index = open_index(tmp_path / "out" / "train")
    expected = ["x__bell__/0", *(f"{c}/{i}" for c in ("__init", "x__background__") for i in "012")]
    assert sorted(index.keys()) == sorted(expected)
    assert index.classes == ("__bell__", "__background__", "__init")
    assert index.class_counts.tolist() == [1, 3, 3]


def test_links_that_lead_above_the_source_are_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "set" / "ant" / "1.jpg")
    save(tmp_path / "other" / "2.jpg")
    (tmp_path / "set" / "ant" / "again").symlink_to("../..")
    (tmp_path / "set" / "ant" / "more").symlink_to("../../other")
    source = image_folder(tmp_path / "set")
    assert source.keys == ["ant/1", "ant/more/2"]
    above = "a link to a folder above the source"
    assert source.skipped == [("ant/again/", above)]
