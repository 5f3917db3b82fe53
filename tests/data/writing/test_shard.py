import hashlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits

from bigbatch.configs.errors import UserError
from bigbatch.data.decode import MAX_PIXELS
from bigbatch.data.index import open_index
from bigbatch.data.writing.shard import ShardReport, parse_bytes, shard, write_shards
from bigbatch.data.writing.sources import digits
from bigbatch.data.writing.write import _write_shards


def tree(root: Path) -> dict[str, str]:
    """A hash of every file below a folder."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def read_with_webdataset(root: Path, extensions: str) -> list[tuple[str, Image.Image, int]]:
    urls = [str(path) for path in sorted(root.glob("*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=False).decode("pil")
    return list(data.to_tuple("__key__", extensions, "cls"))


def test_webdataset_reads_digits_unchanged(digits_root: Path) -> None:
    bunch = load_digits()
    seen = []
    for split in ("train", "val", "test"):
        index = open_index(digits_root / split)
        samples = read_with_webdataset(digits_root / split, "png")
        assert [key for key, _, _ in samples] == index.keys()
        assert [label for _, _, label in samples] == index.label.tolist()
        for key, image, label in samples:
            assert label == bunch.target[int(key)]
            pixels = np.asarray(image)[..., 0]  # webdataset makes RGB of gray
            np.testing.assert_array_equal(pixels, np.round(bunch.images[int(key)] * 255 / 16))
        seen += [int(key) for key, _, _ in samples]
    assert sorted(seen) == list(range(1797))


def test_splits_are_stratified_and_shards_mixed(digits_root: Path) -> None:
    everything = np.bincount(load_digits().target)
    for split, fraction in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        index = open_index(digits_root / split)
        assert index.classes == tuple("0123456789")
        assert np.abs(index.class_counts - everything * fraction).max() <= 1
        assert len(set(index.label[:100].tolist())) == 10


def test_report(digits_root: Path, tmp_path: Path) -> None:
    report = shard("digits", tmp_path / "d", split="0.5,0.5", samples_per_shard=500)
    assert isinstance(report, ShardReport)
    assert report.samples == {"train": 899, "val": 898} or sum(report.samples.values()) == 1797
    assert report.shards == {"train": 2, "val": 2}
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "d").rglob("*.tar"))
    assert report.skipped == []
    assert not (tmp_path / "d" / "test").exists()
    assert not (tmp_path / "d.partial").exists()
    assert (tmp_path / "d" / "classes.txt").read_text().split() == list("0123456789")


def test_image_folder_with_two_processes_is_byte_for_byte_the_same(
    photo_folder: Path, tmp_path: Path
) -> None:
    report = shard(str(photo_folder), tmp_path / "one", samples_per_shard=5)
    assert report.samples == {"train": 30, "val": 3, "test": 3}
    shard(str(photo_folder), tmp_path / "two", samples_per_shard=5, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    index = open_index(tmp_path / "one" / "train")
    assert index.classes == ("cat", "dog", "tree frog")
    for key, label in zip(index.keys(), index.label.tolist(), strict=True):
        assert key.startswith(index.classes[label] + "/")
    for key, image, _ in read_with_webdataset(tmp_path / "one" / "val", "jpg;png"):
        with Image.open(next(photo_folder.glob(f"{key}.*"))) as original:
            np.testing.assert_array_equal(image, original.convert("RGB"))


def test_unreadable_files_are_left_out_and_reported(photo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for path in photo_folder.rglob("*.*"):
        target = folder / path.relative_to(photo_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    whole = (folder / "cat" / "01.jpg").read_bytes()
    (folder / "cat" / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "cat" / "empty.jpg").write_bytes(b"")
    (folder / "dog" / "text.jpg").write_text("I am a text")
    (folder / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    Image.new("1", (20_000, 20_000)).save(folder / "dog" / "bomb.png")
    Image.new("1", (11_000, 10_000)).save(folder / "dog" / "huge.png")
    Image.new("L", (1, 1)).save(folder / "dog" / "one-pixel.png")

    report = shard(str(folder), tmp_path / "d", split="1")
    assert report.samples == {"train": 37}
    reasons = dict(report.skipped)
    assert reasons.keys() == {
        "cat/cut",
        "cat/empty",
        "dog/text",
        "dog/gone",
        "dog/bomb",
        "dog/huge",
    }
    assert reasons["dog/huge"] == f"11000 x 10000 pixels; the limit is {MAX_PIXELS:,}"
    assert "truncated" in reasons["cat/cut"]
    assert reasons["cat/empty"] == "the file is empty"
    assert "not an image (it starts with b'I am a t')" in reasons["dog/text"]
    assert reasons["dog/gone"] == "No such file or directory"
    assert "decompression bomb" in reasons["dog/bomb"]
    listed = (tmp_path / "d" / "skipped.txt").read_text().splitlines()
    assert sorted(line.partition("\t")[0] for line in listed) == sorted(reasons)


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match="no image of the source could be read; the first: cat/a"):
        shard(str(tmp_path / "photos"), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_what_exists_is_never_overwritten(digits_root: Path, tmp_path: Path) -> None:
    before = tree(digits_root)
    with pytest.raises(UserError, match="exists already; remove it, or choose another"):
        shard("digits", digits_root)
    assert tree(digits_root) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        shard("digits", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    shard("digits", tmp_path / "empty")
    assert open_index(tmp_path / "empty" / "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "0.5,0.6"}, "add up to 1"),
        ({"split": "0.5,x"}, "add up to 1"),
        ({"split": "0,1"}, "add up to 1"),
        ({"split": "0.4,0.2,0.2,0.2"}, "add up to 1"),
        ({"samples_per_shard": 0}, "samples per shard 0 must be from 1"),
        ({"workers": 0}, "workers 0 must be"),
        ({"short_side": 4}, "short side 4 must be from 8"),
        ({"quality": 101}, "quality 101 must be from 1 to 100"),
        ({"shard_size": "much"}, "size 'much' is not a number and a unit, such as 256MB"),
        ({"shard_size": "1MB", "samples_per_shard": 5}, "give one of the two"),
        ({"image_column": "x"}, "leave out --image-column"),
    ],
)
def test_bad_options(
    photo_folder: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        shard(str(photo_folder), tmp_path / "d", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_sizes() -> None:
    assert parse_bytes("256MB") == 256_000_000
    assert parse_bytes(" 1.5 GB") == 1_500_000_000
    assert parse_bytes("512") == 512


def test_shard_size(tmp_path: Path) -> None:
    shard("digits", tmp_path / "d", shard_size="200kB", split="1")
    sizes = [s.bytes for s in open_index(tmp_path / "d" / "train").shards]
    assert all(abs(size - 200_000) < 20_000 for size in sizes[:-1])
    assert len(sizes) > 10


def test_short_side(photo_folder: Path, tmp_path: Path) -> None:
    shard(str(photo_folder), tmp_path / "d", short_side=48, split="1")
    originals = {p.relative_to(photo_folder).with_suffix(""): p for p in photo_folder.rglob("*.*")}
    kept = reduced = 0
    index = open_index(tmp_path / "d" / "train")
    data = (index.root / "000000.tar").read_bytes()
    images = {key: image for key, image, _ in read_with_webdataset(index.root, "jpg;png")}
    for i, key in enumerate(index.keys()):
        original = originals[Path(key)]
        with Image.open(original) as image:
            size = image.size
        stored = data[index.offset[i] : index.offset[i] + index.size[i]]
        if min(size) <= 48:
            assert stored == original.read_bytes()
            kept += 1
        else:
            assert min(images[key].size) == 48
            assert images[key].width / images[key].height == pytest.approx(size[0] / size[1], 0.03)
            reduced += 1
    assert kept > 5
    assert reduced > 5


# A run that is killed ----------------------------------------------------------------------

_SHARD = (
    "import sys; from bigbatch.data.writing.shard import shard; "
    "shard(sys.argv[1], sys.argv[2], samples_per_shard=2, short_side=24, "
    "workers=int(sys.argv[3]), progress=False)"
)


@pytest.fixture(scope="session")
def many_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 100: enough work to be killed in the middle of it."""
    root = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(1)
    for i in range(200):
        path = root / f"class {i % 2}" / f"{i:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return root


def start(source: Path, dest: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _SHARD, str(source), str(dest), str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def kill_often(source: Path, tmp_path: Path, kills: int, workers: int) -> None:
    """SIGKILL the sharding of `source` at random moments, and start it again after each.

    The moments are a random number of shards after the start, and some milliseconds, so that
    they fall into all phases of the work on a fast machine and on a loaded one.
    """
    expected = tmp_path / "expected"
    began = time.monotonic()
    assert start(source, expected, workers).communicate()[1] == b""
    undisturbed = time.monotonic() - began
    everything = tree(expected)
    rng = random.Random(kills + workers)
    midway, number, dest = 0, 0, tmp_path / "d0"
    for _ in range(kills):
        if dest.exists():
            assert tree(dest) == everything
            number += 1
            dest = tmp_path / f"d{number}"
        partial = dest.with_name(dest.name + ".partial")
        enough = min(100, shards_in(partial) + rng.randrange(60))
        before = modified(partial / "lock")
        run = start(source, dest, workers)
        while run.poll() is None and (
            modified(partial / "lock") == before or shards_in(partial) < enough
        ):
            time.sleep(0.001)
        time.sleep(rng.random() * (undisturbed if enough == 100 else 0.03))
        run.kill()
        _, errors = run.communicate()  # waits for the end of all its workers, too
        assert b"UserError" not in errors, errors.decode()
        midway += 0 < shards_in(partial) < 100
    assert midway >= kills // 4
    if not dest.exists():
        assert start(source, dest, workers).communicate()[1] == b""
    assert tree(dest) == everything


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("data/*/*.tar")))


def modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_goes_on_after_sigkill(many_photos: Path, tmp_path: Path) -> None:
    kill_often(many_photos, tmp_path, 4, 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_goes_on_after_many_sigkills(many_photos: Path, tmp_path: Path, workers: int) -> None:
    kill_often(many_photos, tmp_path, 20, workers)


def test_ctrl_c_is_one_line_whenever_it_comes(many_photos: Path, tmp_path: Path) -> None:
    program = [str(Path(sys.executable).parent / "bigbatch"), "shard", str(many_photos)]
    options = ["--samples-per-shard", "2", "--short-side", "24", "--workers", "2"]
    for number, pause in enumerate((0.0, 0.2)):
        dest = tmp_path / f"d{number}"
        run = subprocess.Popen(
            [*program, str(dest), *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        lock = dest.with_name(dest.name + ".partial") / "lock"
        while run.poll() is None and not lock.exists():  # its workers start after that
            time.sleep(0.001)
        time.sleep(pause)
        os.killpg(run.pid, signal.SIGINT)
        _, errors = run.communicate()
        assert run.returncode == 130
        assert errors.decode().endswith("stopped; repeat the command to go on where it was\n")
        assert b"Traceback" not in errors


def interrupt_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writing stop, as by Ctrl-C, when some shards are done."""

    def write_some(*args: object) -> Iterator[dict[str, object]]:
        yield from islice(_write_shards(*args), shards)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr("bigbatch.data.writing.write._write_shards", write_some)


def test_finished_shards_are_not_written_again(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> ShardReport:
        return shard(str(photo_folder), tmp_path / "d", samples_per_shard=5)

    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run()
    with pytest.raises(UserError, match="was begun from another source or with other options"):
        shard(str(photo_folder), tmp_path / "d", samples_per_shard=6)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "d.partial").rglob("*.tar")}
    assert len(written) == 3
    next(iter(written)).write_bytes(b"torn by a power cut")
    assert run().samples == {"train": 30, "val": 3, "test": 3}
    again = [p for p, t in written.items() if place(p, tmp_path).stat().st_mtime_ns != t]
    assert again == [next(iter(written))]


def place(partial: Path, tmp_path: Path) -> Path:
    return tmp_path / "d" / partial.relative_to(tmp_path / "d.partial" / "data")


def test_two_at_once_are_refused(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_start_another(*args: object) -> Iterator[dict[str, object]]:
        with pytest.raises(UserError, match="another process is writing"):
            shard(str(photo_folder), tmp_path / "d")
        return _write_shards(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("bigbatch.data.writing.write._write_shards", write_and_start_another)
    assert shard(str(photo_folder), tmp_path / "d").samples["train"] == 30


def test_progress(
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stream for a terminal
    shard(str(photo_folder), tmp_path / "d", progress=True)
    shown = capsys.readouterr()
    assert "36/36" in shown.err
    assert "images/s" in shown.err
    assert shown.out == ""


def test_no_room_on_the_disk(photo_folder: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*/d: .*mend this and repeat"):
            shard(str(photo_folder), tmp_path / "d")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "d").exists()
    assert shard(str(photo_folder), tmp_path / "d").samples["train"] == 30


def test_names_that_are_not_utf_8_are_listed(photo_folder: Path, tmp_path: Path) -> None:
    """In skipped.txt and on the terminal, whichever kind of source they are of."""
    shard(str(photo_folder), tmp_path / "in", split="1")
    (tmp_path / "in" / "train" / "0\udcff.tar").write_bytes(b"no archive")
    report = shard(str(tmp_path / "in" / "train"), tmp_path / "d")
    text = (tmp_path / "d" / "skipped.txt").read_text()
    assert text.startswith("0\ufffd.tar at byte 0\t")
    assert [f"{what}\t{why}" for what, why in report.skipped] == text.splitlines()


@pytest.mark.parametrize("text", ["{", "{}", "[]", "", "[" * 100_000, "\udcff"])
def test_a_damaged_plan_is_of_another_source(photo_folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "d.partial" / "plan.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"d\.partial was begun from another .* remove it to begin"):
        shard(str(photo_folder), tmp_path / "d")


def test_into_the_current_folder(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path / "d")
    assert shard(str(photo_folder), Path(".")).samples["train"] == 30
    assert len(open_index(tmp_path / "d" / "train")) == 30
    assert not (tmp_path / "d.partial").exists()


def test_what_was_written_is_what_is_indexed(tmp_path: Path) -> None:
    """A key that readers pass over would be a defect of ours, and is not silent."""
    bunch = digits()
    source = replace(bunch, keys=["__meta__/0", *bunch.keys[1:]])
    splits = np.full(len(source.keys), "train")
    with pytest.raises(AssertionError, match="wrote 1,797 samples, 1,796 are found"):
        write_shards(source, tmp_path / "d", splits=splits)
    assert not (tmp_path / "d").exists()


def test_the_page_shows_how_to_read_what_shard_digits_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[3] / "docs" / "shards.md"
    (snippet,) = re.findall(r"```python\n(import webdataset.*?)```", page.read_text(), re.DOTALL)
    shard("digits", tmp_path / "shards/digits", progress=False)
    monkeypatch.chdir(tmp_path)
    read: list[tuple[Image.Image, int]] = []
    exec(snippet.replace("    ...", "    read.append((image, label))"), {"read": read})
    assert len(read) == 1078
    assert {label for _, label in read} == set(range(10))
    assert {image.size for image, _ in read} == {(8, 8)}
