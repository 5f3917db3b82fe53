"""Images are checked in threads; what is written is as if there were none."""

import errno
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from bigbatch.data.writing.assign import Shard, assign_splits, plan_shards
from bigbatch.data.writing.recode import prepare
from bigbatch.data.writing.sources import Source
from bigbatch.data.writing.write import Work, _write_shards, write_all


def sources_of_all_sorts() -> Source:
    """JPEGs among images that are damaged, empty, missing, no images, and of other formats."""
    rng = np.random.default_rng(5)
    found: list[bytes | OSError] = []
    for i in range(60):
        file = io.BytesIO()
        side = int(rng.integers(8, 120))
        image = Image.fromarray(rng.integers(0, 256, (side, 90, 3), dtype=np.uint8))
        image.save(file, ("JPEG", "PNG", "JPEG", "WEBP")[i % 4])
        data = file.getvalue()
        missing = FileNotFoundError(errno.ENOENT, "No such file")
        found.append({5: data[: len(data) // 2], 6: b"", 7: b"a text", 8: missing}.get(i % 9, data))

    def read(i: int) -> bytes:
        data = found[i]
        if isinstance(data, OSError):
            raise data
        return data

    labels = np.arange(60, dtype=np.int32) % 3
    return Source([f"{i:03d}" for i in range(60)], labels, ("a", "b", "c"), read)


def one_shard(items: npt.NDArray[np.int64]) -> Shard:
    return Shard("train/000000.tar", items, np.zeros_like(items))


@pytest.mark.parametrize("short_side", [None, 24])
@pytest.mark.parametrize(("size", "count"), [(1, 64), (20_000, 64), (1 << 20, 7), (1 << 20, 64)])
def test_what_is_written_is_as_one_by_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    short_side: int | None,
    size: int,
    count: int,
) -> None:
    monkeypatch.setattr("bigbatch.data.writing.write._BATCH_BYTES", size)
    monkeypatch.setattr("bigbatch.data.writing.write._BATCH", count)
    source = sources_of_all_sorts()
    expected, skipped, ticks = io.BytesIO(), [], list[int]()
    order = np.random.default_rng(6).permutation(60)
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in order.tolist():
            try:
                data, extension = prepare(source.read(i), short_side, 90)
            except OSError as error:
                skipped.append((source.keys[i], error.strerror or str(error)))
                continue
            members = {extension: data, "cls": str(source.labels[i]).encode()}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{source.keys[i]}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    work = Work(source, str(tmp_path), short_side, 90)
    (record,) = _write_shards(work, [one_shard(order)], ticks.append)
    assert (record["samples"], record["skipped"]) == (60 - len(skipped), skipped)
    assert len(skipped) == 25
    assert sum(ticks) == 60
    written = (tmp_path / "train" / "000000.tar").read_bytes()
    assert written == expected.getvalue()[:end] + bytes(1024)


def test_an_error_of_the_disk_ends_it(tmp_path: Path) -> None:
    source = sources_of_all_sorts()

    def read(i: int) -> bytes:
        if i == 40:
            raise OSError(errno.EIO, "Input/output error")
        return source.read(i)

    work = Work(replace(source, read=read), str(tmp_path), None, 90)
    with pytest.raises(OSError, match="Input/output error"):
        list(_write_shards(work, [one_shard(np.arange(60))], lambda _: None))
    assert not (tmp_path / "train" / "000000.tar").exists()


def test_what_is_in_memory_serves_all_splits(tmp_path: Path) -> None:
    """Groups are read once for train, val and test together; bytes are as of one shard each."""
    reads = list[int]()
    source = sources_of_all_sorts()

    def read(i: int) -> bytes:
        if not reads or reads[-1] != i // 12:
            reads.append(i // 12)
        return source.read(i)

    grouped = replace(source, read=read, groups=np.arange(60) // 12)
    splits = assign_splits(grouped, None)
    tasks = plan_shards(grouped, splits, 9)
    assert len(tasks) > 3
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
    records = list(write_all(Work(grouped, str(together), None, 90), tasks, 1, False))
    assert sorted(reads) == [0, 1, 2, 3, 4]
    expected = [
        record
        for task in tasks
        for shard in task
        for record in _write_shards(Work(source, str(alone), None, 90), [shard], lambda _: None)
    ]
    assert sorted(records, key=str) == sorted(expected, key=str)
    assert {r["shard"].partition("/")[0] for r in records} == {"train", "val", "test"}
    for record in records:
        name = record["shard"]
        assert (together / name).read_bytes() == (alone / name).read_bytes()
