"""Streams: what arrives is decoded by an allow-list, and faults are counted, not hidden."""

import io
import itertools
import pickle
import subprocess
import tarfile
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from webdataset.filters import detshuffle

from bigbatch.configs.errors import UserError
from bigbatch.configs.stream import ALLOW_PIPE
from bigbatch.data import stream
from bigbatch.data.batch import BatchPlan, Decoding
from bigbatch.data.decode import decode
from bigbatch.data.index import open_index
from bigbatch.data.read import ShardReader
from bigbatch.data.stream import Encoded, stream_batches, stream_samples
from bigbatch.data.tar import write_end, write_member
from bigbatch.data.writing.shard import shard
from tests.helpers.micro_batches import planned


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    dest = tmp_path_factory.mktemp("shards") / "digits"
    shard("digits", dest, samples_per_shard=300)
    return dest / "train"


def tar(path, members):
    with path.open("wb") as file:
        for name, data in members:
            write_member(file, name, data)
        write_end(file)
    return str(path)


def some(urls, count, **changes):
    options = {"seed": 1, "part": 0, "bad_samples": 0}
    return list(itertools.islice(stream_samples(urls, **{**options, **changes}), count))


@pytest.fixture(autouse=True)
def commands_are_allowed(monkeypatch):
    monkeypatch.setenv(ALLOW_PIPE, "1")


PLAN = BatchPlan(global_batch=32, micro_batch=8, rank=0, world=1, start_step=0, stop_step=5)
DECODING = Decoding(8, channels=1, workers=0, threads=2)


def batches_of(urls, classes=10, **changes):
    plan, decoding = planned(changes, PLAN, DECODING)
    return list(stream_batches(urls, plan, decoding, classes=classes, seed=1))


@pytest.mark.parametrize(
    "form", ["{}", "file://{}", "pipe:cat {}", "pipe:tar -cf - --sort=name -C {0}.d ."]
)
def test_samples_are_those_of_the_shards(digits, tmp_path, form):
    if "tar" in form:  # a command that makes its archive as it goes
        for path in digits.glob("*.tar"):
            folder = tmp_path / f"{path.name}.d"
            folder.mkdir()
            subprocess.run(["tar", "-xf", path, "-C", folder], check=True)
        urls = [form.format(tmp_path / path.name) for path in digits.glob("*.tar")]
    else:
        urls = [form.format(path) for path in sorted(digits.glob("*.tar"))]
    index = open_index(digits)
    reader = ShardReader([digits / s.name for s in index.shards])
    columns = (index.shard, index.offset, index.size, index.crc)
    known = {
        key.rpartition("/")[2]: (reader.read(*byte_range), int(label))
        for key, *byte_range, label in zip(
            index.keys(), *(c.tolist() for c in columns), index.label, strict=True
        )
    }
    found = some(urls, 3000)
    assert all(known[key.rpartition("/")[2]] == (image, label) for key, image, label, _ in found)
    assert len({key for key, *_ in found}) > 0.8 * len(index)


def test_the_same_seed_draws_the_same_and_parts_differ(digits):
    urls = [str(path) for path in sorted(digits.glob("*.tar"))]
    keys = [[s.key for s in some(urls, 500, **c)] for c in ({}, {}, {"seed": 2}, {"part": 1})]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
    assert keys[0] != keys[3]
    assert keys[0][:50] != sorted(keys[0][:50])


def test_micro_batches_go_to_ranks_and_hold_decoded_images(digits):
    urls = [str(path) for path in sorted(digits.glob("*.tar"))]
    whole = batches_of(urls)
    assert [(b.step, b.index) for b in whole] == [(s, m) for s in range(5) for m in range(4)]
    assert [int(b.samples[0]) for b in whole] == list(range(0, 160, 8))
    encoded = {s.image: s.label for s in some(urls, 5000)}
    pictures = {}
    for image, label in encoded.items():
        pictures.setdefault(decode(image, image_size=8, channels=1).tobytes(), set()).add(label)
    for batch in whole:
        assert batch.canvas().shape == (8, 8, 8, 1)
        for image, label in zip(batch.images(), batch.labels.tolist(), strict=True):
            assert label in pictures[image.numpy().tobytes()]
    ranks = [batches_of(urls, rank=r, world=3) for r in range(3)]
    places = sorted((b.step, b.index) for batches in ranks for b in batches)
    assert places == [(b.step, b.index) for b in whole]
    assert len({b.pixels.numpy().tobytes() for batches in ranks for b in batches}) == 20


def test_a_resumed_run_draws_afresh(digits):
    urls = [str(path) for path in sorted(digits.glob("*.tar"))]
    whole = {b.pixels.numpy().tobytes() for b in batches_of(urls)}
    later = {b.pixels.numpy().tobytes() for b in batches_of(urls, start_step=2)}
    assert not whole & later


class Bomb:
    def __reduce__(self):
        return open, ("unpickled", "w")


def test_nothing_is_unpickled(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = open_index(digits)
    image = ShardReader([digits / s.name for s in data.shards]).read(
        0, int(data.offset[0]), int(data.size[0]), int(data.crc[0])
    )
    bomb = pickle.dumps(Bomb())
    members = [
        (f"{i}.{name}", content)
        for i in range(5)
        for name, content in (
            ("pkl", bomb),
            ("pyd", bomb),
            ("pickle", bomb),
            ("pth", bomb),
            ("png", image),
            ("cls", b"3"),
        )
    ]
    found = some([tar(tmp_path / "a.tar", members)], 20)
    assert {s.label for s in found} == {3}
    assert not (tmp_path / "unpickled").exists()


def test_no_shell_runs_a_command(digits, tmp_path):
    mark = tmp_path / "mark"
    first = sorted(digits.glob("*.tar"))[0]
    with pytest.raises(UserError, match="could not be read"):
        some([f"pipe:cat {first}.none; touch {mark}"], 1)
    assert not mark.exists()


@pytest.mark.parametrize(
    "bad",
    ["pipe:false", "pipe:no-such-command x", "{tmp}/none.tar", "file://{tmp}/none.tar", "{text}"],
)
def test_shards_that_cannot_be_read_are_passed_over_up_to_a_limit(digits, tmp_path, bad):
    (tmp_path / "text").write_text("not an archive" * 100)
    good = [str(path) for path in sorted(digits.glob("*.tar"))]
    bad = bad.format(tmp=tmp_path, text=tmp_path / "text")
    assert len(some([*good, bad], 2000, bad_samples=100)) == 2000
    with pytest.raises(UserError, match="bad_samples allows 0"):
        some([bad], 1)


def test_samples_that_cannot_be_used(digits, tmp_path):
    png = some([str(next(digits.glob("*.tar")))], 1)[0].image
    cases = {
        "no label": [("a.png", png)],
        "no image": [("a.cls", b"1")],
        "two images": [("a.png", png), ("a.jpg", png), ("a.cls", b"1")],
        "label": [("a.png", png), ("a.cls", b"one")],
        "nested": [("a.png", png), ("a.json", b"[" * 100_000)],
        "nothing": [("a.txt", b"text")],
        "empty": [],
    }
    for name, members in cases.items():
        with pytest.raises(UserError, match="could not be read"):
            some([tar(tmp_path / f"{name}.tar", members)], 1, bad_samples=3)
    labelled = tar(tmp_path / "json.tar", [("a.png", png), ("a.json", b'{"label": 4}')])
    assert some([labelled], 2)[1].label == 4
    for members in ([("a.png", b"no image"), ("a.cls", b"1")], [("a.png", png), ("a.cls", b"10")]):
        with pytest.raises(UserError, match="could not be read"):
            batches_of([tar(tmp_path / "x.tar", members)], bad_samples=3)
    with pytest.raises(UserError, match="at least one URL"):
        some([], 1)


def test_classes_come_as_often_as_in_the_shards(digits):
    urls = [str(path) for path in sorted(digits.glob("*.tar"))]
    labels = Counter(label for b in batches_of(urls, stop_step=100) for label in b.labels.tolist())
    counts = open_index(digits).class_counts
    share = np.array([labels[c] for c in range(10)]) / labels.total()
    assert np.abs(share - counts / counts.sum()).max() < 0.03


def test_a_command_runs_only_where_the_environment_allows_it(tmp_path, monkeypatch, digits):
    mark = tmp_path / "mark"
    for allowed in (None, "", "0", "true"):
        if allowed is None:
            monkeypatch.delenv(ALLOW_PIPE)
        else:
            monkeypatch.setenv(ALLOW_PIPE, allowed)
        for url in (f"pipe:touch {mark}", f"{{pipe:touch {mark},pipe:false}}"):
            with pytest.raises(UserError, match=f"runs a command.*{ALLOW_PIPE}=1"):
                some([url], 1, bad_samples=10)
    assert not mark.exists()
    assert some([str(digits / "000000.tar")], 1)  # what is no command needs no word


@pytest.mark.parametrize("name", ["big.png", "big.cls", "big.json"])
def test_what_a_member_takes_is_known_before_it_is_read(tmp_path, digits, monkeypatch, name):
    """A compressed tar of kilobytes took 23 GB behind the shuffle buffer."""
    monkeypatch.setattr(stream, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(stream, "_SHUFFLED", 4)
    path = tmp_path / "bomb.tar.gz"
    png = next(iter(some([str(digits / "000000.tar")], 1))).image
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for member, size in ((name, 20 << 20), ("a.png", len(png)), ("a.cls", 1)):
            info = tarfile.TarInfo(member)
            info.size = size
            data = png if member == "a.png" else b"1"
            archive.addfile(info, Zeros(size) if member == name else io.BytesIO(data))
    tracemalloc.start()
    try:
        found = some([str(path)], 1, bad_samples=10**6)
        assert tracemalloc.get_traced_memory()[1] < 15 << 20
    finally:
        tracemalloc.stop()
    assert [sample.key for sample in found] == ["a"]
    with pytest.raises(UserError, match="20,971,520 bytes, which is more than is read"):
        some([str(path)], 1)


class Zeros(io.RawIOBase):
    """A file of zeros."""

    def __init__(self, size):
        self.left = size

    def read(self, size=-1):
        size = min(self.left, size)
        self.left -= size
        return bytes(size)


def test_an_extended_header_of_any_size_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "bomb.tar"
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 14))
    with pytest.raises(UserError, match="extended header of 1,099,511,627,776 bytes"):
        some([str(path)], 1)


def test_large_samples_wait_in_a_smaller_buffer(monkeypatch):
    monkeypatch.setattr(stream, "_SHUFFLED_BYTES", 1000)
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield Encoded(str(number), bytes(100), 0, "")

    found = [sample.key for sample in itertools.islice(stream._mixed(endless(), 1), 200)]
    assert len(set(found)) == 200
    assert found != sorted(found, key=int)
    assert len(taken) < 220  # no more than a dozen wait


@pytest.mark.parametrize("count", [5, 1000, 5000])
def test_draws_are_webdataset_s(count):
    samples = [Encoded(str(number), b"", 0, "") for number in range(count)]
    expected = list(detshuffle(2000, initial=1000, seed=7).run(iter(samples)))
    assert list(stream._mixed(iter(samples), 7)) == expected
