import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.data.index import find_shards, open_index
from bigbatch.data.writing.archives import tars
from bigbatch.data.writing.folders import image_folder
from bigbatch.data.writing.kinds import open_source
from bigbatch.data.writing.shard import shard
from bigbatch.data.writing.sources import digits, unique_keys


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9)).save(path)


@given(st.lists(st.text("ab./é\n\udc80", min_size=1)))
def test_keys_are_unique_and_fit_webdataset(names: list[str]) -> None:
    keys = unique_keys(names)
    assert len(set(keys)) == len(names)
    for key in keys:
        assert "." not in key.rpartition("/")[2]
        assert "\n" not in key
        key.encode()


def test_keys_known() -> None:
    names = ["cat/a.jpg", "cat/a.png", "cat/b.c.jpg", "c.d/x.jpg", "cat/a-2.gif"]
    assert unique_keys(names) == ["cat/a", "cat/a-2", "cat/b_c", "c.d/x", "cat/a-2-2"]


def test_digits() -> None:
    source = digits()
    assert len(source.keys) == 1797
    assert source.keys[12] == "0012"
    assert source.read(12)[:4] == b"\x89PNG"


def test_image_folder(tmp_path: Path) -> None:
    touch(
        tmp_path / "b" / "deep" / "1.PNG",
        tmp_path / "b" / "2.jpg",
        tmp_path / "a.b" / "3.jpeg",
        tmp_path / "a.b" / ".hidden.jpg",
        tmp_path / ".git" / "4.jpg",
    )
    (tmp_path / "a.b" / "notes.txt").write_text("x")
    (tmp_path / "top.jpg").write_text("no class")
    source = image_folder(tmp_path)
    assert source.classes == ("a.b", "b")
    assert source.keys == ["a.b/3", "b/2", "b/deep/1"]
    assert source.labels.tolist() == [0, 1, 1]
    assert source.splits is None
    assert source.read(1) == (tmp_path / "b" / "2.jpg").read_bytes()


def test_image_folder_with_splits(tmp_path: Path) -> None:
    touch(
        tmp_path / "Train" / "a" / "1.png",
        tmp_path / "Train" / "b" / "1.png",
        tmp_path / "validation" / "b" / "1.png",
    )
    source = image_folder(tmp_path)
    assert source.classes == ("a", "b")
    assert source.splits is not None
    assert source.splits.tolist() == ["train", "train", "val"]
    assert source.labels.tolist() == [0, 1, 1]
    touch(tmp_path / "val" / "b" / "2.png")
    with pytest.raises(UserError, match="two folders mean the same split: Train, val, validation"):
        image_folder(tmp_path)
    shutil.rmtree(tmp_path / "val")
    touch(tmp_path / "cat" / "2.png")
    with pytest.raises(UserError, match=r"holds both splits .* and other folders \(cat\)"):
        image_folder(tmp_path)


def test_no_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no source 'nowhere'; give `digits`, or the path of"):
        open_source("nowhere")
    with pytest.raises(UserError, match=r"holds no images in class folders; expected CLASS/NAME"):
        open_source(str(tmp_path))
    (tmp_path / "packed.tar.gz").touch()
    for read in (lambda: open_source(str(tmp_path)), lambda: find_shards(tmp_path)):
        with pytest.raises(
            UserError, match=r"holds no .* \('packed.tar.gz' is compressed: unpack it"
        ):
            read()
    touch(tmp_path / "flat.jpg")
    with pytest.raises(UserError, match="holds no images in class folders"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match=r"is neither a \.parquet nor a \.tar file nor a folder"):
        open_source(str(tmp_path / "flat.jpg"))
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"cannot read .*x\.parquet"):
        open_source(str(tmp_path / "x.parquet"))
    (tmp_path / "x.tar").write_text("no tar")
    with pytest.raises(UserError, match=r"x\.tar holds no image with a label .*x\.tar at byte 0"):
        open_source(str(tmp_path / "x.tar"))


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no permission stops, so the answer is given by hand."""
    touch(tmp_path / "a" / "1.png", tmp_path / "b" / "1.png")
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read .*/b: Permission denied"):
        image_folder(tmp_path)


def test_reshard(digits_root: Path, tmp_path: Path) -> None:
    """Shards as a source: same splits, keys, labels, classes and bytes of images."""
    shard(str(digits_root), tmp_path / "again", samples_per_shard=64)
    for split in ("train", "val", "test"):
        before, after = open_index(digits_root / split), open_index(tmp_path / "again" / split)
        assert after.classes == before.classes
        assert len(after.shards) > len(before.shards)
        one = dict(zip(before.keys(), zip(before.label, before.crc, strict=True), strict=True))
        other = dict(zip(after.keys(), zip(after.label, after.crc, strict=True), strict=True))
        assert one == other


def test_tars_without_splits(digits_root: Path, tmp_path: Path) -> None:
    for name in ("000000.tar", "000001.tar"):
        shutil.copy(digits_root / "train" / name, tmp_path / name)
    shutil.copy(digits_root / "train" / "000001.tar", tmp_path / "copy.tar")
    cut = (digits_root / "train" / "000002.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(cut[:20_000])
    source = tars(tmp_path, workers=1)
    assert source.splits is None
    assert source.classes == tuple("0123456789")
    assert len(source.keys) == 600 + 9
    reasons = [reason for _, reason in source.skipped]
    assert reasons.count("copy.tar: has the key of an earlier sample") == 300
    assert [what for what, _ in source.skipped if "cut.tar at byte 1" in what]
    report = shard(str(tmp_path), tmp_path / "d")
    assert sum(report.samples.values()) == 609
    assert len(report.skipped) == len(source.skipped)
    lines = (tmp_path / "d" / "skipped.txt").read_text().splitlines()
    assert len(lines) == len(source.skipped)


def test_one_tar(digits_root: Path) -> None:
    source = open_source(str(digits_root / "train" / "000000.tar"))
    index = open_index(digits_root / "train")
    assert source.keys == index.keys()[:300]
    np.testing.assert_array_equal(source.labels, index.label[:300])
    assert source.read(5)[:4] == b"\x89PNG"
