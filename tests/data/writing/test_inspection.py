import json
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.data.index import open_index
from bigbatch.data.writing.inspection import _name_classes, inspect, overlapping
from bigbatch.data.writing.shard import shard


@pytest.fixture
def photos_root(photo_folder: Path, tmp_path: Path) -> Path:
    shard(str(photo_folder), tmp_path / "shards", samples_per_shard=8)
    return tmp_path / "shards"


def test_digits(digits_root: Path, tmp_path: Path) -> None:
    report = inspect(digits_root, picture=tmp_path / "digits.png")
    assert json.loads(json.dumps(report)) == report
    assert list(report["splits"]) == ["train", "val", "test"]
    assert sum(s["samples"] for s in report["splits"].values()) == 1797
    train = report["splits"]["train"]
    index = open_index(digits_root / "train")
    assert train["labels"] == dict(zip("0123456789", index.class_counts.tolist(), strict=True))
    assert train["shards"] == 4
    assert train["formats"] == {"png": 1078}
    assert train["resolutions"] == [{"width": 8, "height": 8, "images": 1078}]
    assert train["image_bytes"]["max"] == index.size.max()
    assert report["problems"] == []
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.width > 1000


def test_resolutions(photo_folder: Path, photos_root: Path) -> None:
    sizes = [Image.open(p).size for p in photo_folder.rglob("*.*")]
    report = inspect(photos_root / "train", verify=True)
    train = report["splits"]["train"]
    assert train["looked_at"] == 30
    assert min(s[0] for s in sizes) <= train["width"]["min"] <= train["width"]["median"]
    assert train["height"]["max"] <= max(s[1] for s in sizes)
    assert set(train["formats"]) == {"jpeg", "png"}


def test_changed_bytes_are_named(photos_root: Path) -> None:
    index = open_index(photos_root / "train")
    sample = 10
    path = index.root / index.shards[index.shard[sample]].name
    data = bytearray(path.read_bytes())
    data[int(index.offset[sample])] ^= 1
    path.write_bytes(data)
    problems = inspect(photos_root)["problems"]
    place = f"train/{path.name} at byte {index.offset[sample]:,}"
    assert problems == [f"{place}: its bytes are not those that were indexed"]


def test_an_unreadable_split_leaves_the_others(photos_root: Path) -> None:
    (photos_root / "train" / "000001.tar").unlink()
    shutil.rmtree(photos_root / "test" / "index")
    report = inspect(photos_root)
    assert list(report["splits"]) == ["val"]
    assert len(report["problems"]) == 2
    assert "000001.tar cannot be read" in report["problems"][0]
    assert "has no index" in report["problems"][1]


def test_the_same_image_in_train_and_test(photo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for split in ("train", "test"):
        shutil.copytree(photo_folder, folder / split)
    shutil.rmtree(folder / "test" / "dog")
    shutil.copy(folder / "train" / "cat" / "01.jpg", folder / "train" / "cat" / "twin.jpg")
    shard(str(folder), tmp_path / "d", split="1")
    assert inspect(tmp_path / "d")["duplicates"] == {"train": 1, "train+test": 24}


def test_only_verify_decodes(tmp_path: Path) -> None:
    """A damaged image that was indexed as it is: its CRC is right, its picture is not."""
    from bigbatch.data.index import build_index
    from bigbatch.data.tar import write_end, write_member

    image = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(image)
    with (tmp_path / "0.tar").open("wb") as file:
        write_member(file, "a.jpg", image.read_bytes()[:-500])
        write_member(file, "a.cls", b"0")
        write_end(file)
    build_index(tmp_path)
    assert inspect(tmp_path)["problems"] == []
    problems = inspect(tmp_path, verify=True)["problems"]
    assert len(problems) == 1
    assert "0.tar at byte 512: cannot be decoded: image file is truncated" in problems[0]


def test_nothing_to_inspect(tmp_path: Path, digits_root: Path) -> None:
    with pytest.raises(UserError, match="holds no shards; give the folder"):
        inspect(tmp_path)
    with pytest.raises(UserError, match="gone is not there; give the folder"):
        inspect(tmp_path / "gone")
    with pytest.raises(UserError, match="cannot draw into"):
        inspect(digits_root / "val", picture=tmp_path / "x.nonsense")


def test_shards_in_capitals_without_an_index_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.TAR").write_bytes(b"")
    assert "has no index" in inspect(tmp_path)["problems"][0]


@pytest.mark.parametrize(("count", "length"), [(10, 1), (5, 9), (40, 16), (3, 200)])
def test_names_of_classes_do_not_overlap(count: int, length: int) -> None:
    figure = Figure(figsize=(14, 4), layout="constrained")
    axes = figure.subplots(1, 3)[0]
    axes.bar(range(count), range(count))
    _name_classes(axes, [f"{i:x<{length}}" for i in range(count)])
    labels = axes.xaxis.get_ticklabels()
    assert not overlapping(labels)
    assert len(labels) >= min(count, 10)  # few are left out
    bottom = min(label.get_window_extent().y0 for label in labels)
    assert bottom >= 0  # and none runs out of the picture
