"""An index that says what cannot be true: one message at its opening, and nothing elsewhere."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigbatch.configs.errors import UserError
from bigbatch.data import index_check, index_files
from bigbatch.data.index import build_index, open_index, verify_index
from bigbatch.data.index_check import COLUMNS, check_columns
from bigbatch.data.remote import open_remote
from bigbatch.data.remote_index import build_remote_index
from bigbatch.data.staging import Remote, stat
from bigbatch.data.tar import write_end, write_member

LABELS = (2, 0, 0, 1, 2, 0)  # of six samples in two shards, three each
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "train"
    folder.mkdir()
    for shard in range(2):
        with (folder / f"{shard}.tar").open("wb") as file:
            for i in range(3 * shard, 3 * shard + 3):
                write_member(file, f"{i}.jpg", b"picture" * (i + 1))
                write_member(file, f"{i}.cls", str(LABELS[i]).encode())
            write_end(file)
    build_index(folder)
    return folder


@pytest.fixture
def split(indexed: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(indexed, tmp_path / "shards" / "train"))


def forge(split: Path, change: Change, column: str | None = None) -> None:
    """Change the manifest, or a column, and make all hashes right again."""
    index = split / "index"
    manifest = json.loads((index / "manifest.json").read_text())
    if column is None:
        change(manifest)
    else:
        path = index / f"{column}.npy"
        values = np.load(path)
        changed = change(values)
        np.save(path, values if changed is None else changed)
        manifest["columns"][column] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["hash"] = index_files._hash(manifest)
    (index / "manifest.json").write_text(json.dumps(manifest))


def put(key: str, value: Any) -> Change:
    return lambda manifest: manifest.update({key: value})


def put_shard(key: str, value: Any) -> Change:
    return lambda manifest: manifest["shards"][0].update({key: value})


MANIFESTS: dict[str, tuple[Change, str]] = {
    "a column more": (
        lambda m: m["columns"].update({"other": "0" * 64}),
        "columns has 'other', which no index has",
    ),
    "a column less": (lambda m: m["columns"].pop("crc"), "columns has no crc"),
    "columns in a list": (put("columns", list(COLUMNS)), "columns is no mapping"),
    "no digest": (lambda m: m["columns"].update(crc=7), "columns holds what is no SHA-256"),
    "a field more": (put("extra", 1), "it has 'extra', which no index has"),
    "a field less": (lambda m: m.pop("problems"), "it has no problems"),
    "passed over": (put("passed_over", {"members .txt": -1}), "passed_over holds what is no"),
    "passed over, a list": (put("passed_over", ["a"]), "passed_over holds what is no count"),
    "classes": (put("classes", [1, 2, 3]), "classes is no list of texts"),
    "no class": (put("classes", []), "it names no class"),
    "no sample": (put("samples", 0), "samples = 0"),
    "half a sample": (put("samples", 6.0), r"samples = 6\.0"),
    "true samples": (put("samples", True), "samples = True"),
    "more samples": (put("samples", 7), "its shards hold 6 samples, it says 7"),
    "endless samples": (put("samples", 1 << 80), "samples = 1208925"),
    "no shards": (put("shards", []), "shards is no list of archives"),
    "a shard's field": (put_shard("url", "x"), "a shard has 'url', which no index has"),
    "bytes": (put_shard("bytes", -1), r"0\.tar has -1 bytes"),
    "a shard twice": (put_shard("name", "1.tar"), "two shards have the same name"),
    "a class less": (put("classes", ["a", "b"]), r"it holds int64 \(4,\)"),
    "a label": (put("classes", ["a", "b", "c", "d"]), r"it holds int64 \(4,\)"),
    "short shards": (put_shard("bytes", 1536), "sample 1 reaches beyond the end of its shard"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_is_checked_as_a_whole(split: Path, what: str) -> None:
    change, message = MANIFESTS[what]
    forge(split, change)
    with pytest.raises(UserError, match=rf"is damaged \({message}.*make it again with"):
        open_index(split)


@pytest.mark.parametrize(
    "name", ["../0.tar", "/0.tar", "a/0.tar", "..", ".0.tar", "0.tar\n1.tar", "0.zip", "", 3, None]
)
def test_a_shard_is_a_file_in_the_folder(split: Path, name: Any) -> None:
    shutil.copy(split / "0.tar", split.parent)
    forge(split, put_shard("name", name))
    with pytest.raises(UserError, match=r"is no name of a shard: NAME\.tar in the folder itself"):
        open_index(split)


def set_value(place: int, value: int) -> Change:
    def change(values: Any) -> None:
        values[place] = value

    return change


COLUMN_FAULTS: dict[str, tuple[str, Change, str]] = {
    "a label too high": ("label", set_value(1, 3), r"label \[3\] of 3 classes"),
    "a negative label": ("label", set_value(1, -1), r"label \[-1\] of 3 classes"),
    "another label": ("label", set_value(1, 1), "class lists have other lengths than classes"),
    "swapped labels": ("label", lambda v: v[::-1].copy(), "holds another's sample"),
    "no such shard": ("shard", set_value(5, 2), "shard 2 of 2"),
    "mixed shards": ("shard", lambda v: v[::-1].copy(), "shards are mixed"),
    "a sample of the other": ("shard", set_value(2, 1), "other numbers of samples than it says"),
    "an offset": ("offset", set_value(4, 1 << 20), "sample 4 reaches beyond the end"),
    "an offset that wraps": ("offset", set_value(4, (1 << 64) - 7), "sample 4 reaches beyond"),
    "a size": ("size", set_value(3, 1 << 31), "sample 3 reaches beyond the end"),
    "starts that fall": ("class_starts", set_value(1, 5), "no places of class lists"),
    "starts that end early": ("class_starts", set_value(3, 5), "no places of class lists"),
    "starts that begin late": ("class_starts", set_value(0, 1), "no places of class lists"),
    "other starts": ("class_starts", set_value(1, 2), "class lists have other lengths"),
    "no such member": ("class_members", set_value(0, 6), "class_members holds sample 6"),
    "a member twice": ("class_members", set_value(0, 2), "holds a sample twice"),
    "another's member": ("class_members", set_value(0, 0), "holds another's sample"),
    "other numbers": ("size", lambda v: v.astype(np.int64), r"it holds int64 \(6,\)"),
    "other bytes": ("crc", lambda v: v.astype(">u4"), r"it holds >u4 \(6,\)"),
    "a table": ("crc", lambda v: v.reshape(2, 3), r"it holds uint32 \(2, 3\)"),
}


@pytest.mark.parametrize("what", COLUMN_FAULTS)
def test_columns_are_checked_against_the_manifest(split: Path, what: str) -> None:
    column, change, message = COLUMN_FAULTS[what]
    forge(split, change, column)
    with pytest.raises(UserError, match=rf"is damaged \(.*{message}.*make it again with"):
        open_index(split)


@pytest.mark.parametrize("what", ["an offset", "starts that fall"])
def test_of_a_large_index_the_columns_are_read_by_check_alone(
    split: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_files, "_READ_AT_OPEN", 0)
    column, change, message = COLUMN_FAULTS[what]
    forge(split, change, column)
    if column == "class_starts":  # few, and the first thing that an order looks at
        with pytest.raises(UserError, match=message):
            open_index(split)
        return
    with pytest.raises(UserError, match=rf"is damaged \({message}.*make it again with"):
        verify_index(open_index(split))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Random indexes pass, and a random change of any value of theirs does not."""
    monkeypatch.setattr(index_check, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    for _ in range(30):
        counts = rng.integers(0, 5, 4)
        samples, classes = max(1, int(counts.sum())), int(rng.integers(1, 5))
        counts[0] += samples - counts.sum()
        label = rng.integers(0, classes, samples).astype(np.int32)
        columns = {
            "shard": np.repeat(np.arange(4), counts).astype(np.uint32),
            "offset": rng.integers(0, 90, samples).astype(np.uint64),
            "size": np.full(samples, 10, np.uint32),
            "label": label,
            "class_starts": np.cumsum([0, *np.bincount(label, minlength=classes)]),
            "class_members": np.argsort(label, kind="stable").astype(np.uint32),
        }
        manifest = {
            "samples": samples,
            "classes": [str(i) for i in range(classes)],
            "shards": [{"bytes": 100, "samples": int(n)} for n in counts],
        }
        check_columns(columns, manifest)
        for name in columns.keys() - {"offset", "size"}:
            changed = columns[name].copy()
            changed[rng.integers(len(changed))] += 1
            with pytest.raises(ValueError):  # noqa: PT011
                check_columns({**columns, name: changed}, manifest)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[" * 100_000,
        b"\xff{}",
        b'{"format": ' + b"9" * 5000 + b"}",
        b"[]",
        b"7",
        b'"\\ud800"',
    ],
    ids=["empty", "deep", "no text", "long number", "list", "number", "surrogate"],
)
def test_what_is_no_manifest(split: Path, text: bytes) -> None:
    (split / "index" / "manifest.json").write_bytes(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged .* make it again"):
        open_index(split)


@pytest.mark.parametrize(
    "text",
    [
        b"PK\x03\x04" + bytes(200),
        b"PK\x05\x06" + bytes(200),
        b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118,
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(200),
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '|O', 'fortran_order': False, 'shape': (6,), }".ljust(118),
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<u4', 'fortran_order': False, 'shape': (-6,), }".ljust(118),
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<u4', 'fortran_order': False, 'shape': (1<<70,), }".ljust(118),
    ],
    ids=["zip", "empty zip", "parentheses", "long header", "objects", "negative", "expression"],
)
def test_what_is_no_column(split: Path, text: bytes) -> None:
    (split / "index" / "crc.npy").write_bytes(text)
    with pytest.raises(UserError, match=r"crc\.npy is damaged .* make it again"):
        open_index(split)


@pytest.mark.parametrize("table", [{"key": ["a"]}, {"other": list("abcdef")}])
def test_keys_that_do_not_fit(split: Path, table: dict[str, list[str]]) -> None:
    index = open_index(split)
    pq.write_table(pa.table(table), split / "index" / "keys.parquet")
    with pytest.raises(UserError, match=r"keys\.parquet is damaged"):
        index.keys()


def test_a_name_that_no_index_takes_is_refused_when_it_is_made(split: Path) -> None:
    (split / "0.tar").rename(split / "a\nb.tar")
    with pytest.raises(UserError, match=r"'a\\nb\.tar' is no name of a shard.*rename it"):
        build_index(split)
    assert json.loads((split / "index" / "manifest.json").read_text())["samples"] == 6


@pytest.fixture
def remote(split: Path, tmp_path: Path) -> Remote:
    return Remote(f"file://{split}", str(tmp_path / "cache" / "deep"), 1 << 30)


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["../../../../escaped", "{absolute}", "other", "shard/../escaped"])
def test_a_remote_index_writes_into_the_cache_alone(
    split: Path, remote: Remote, tmp_path: Path, name: str
) -> None:
    """Its manifest names a further column, which lies where a copier would look for it."""
    name = name.format(absolute=tmp_path / "escaped")
    target = Path(os.path.normpath(split / "index" / f"{name}.npy"))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(split / "index" / "crc.npy", target)
    forge(split, lambda m: m["columns"].update({name: m["columns"]["crc"]}))
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=r"is damaged, or was replaced .*, which no index has"):
        open_remote(remote)
    assert files_in(tmp_path) == before
    assert not list(Path(remote.cache).glob("indexes/*"))


def test_a_remote_column_of_another_size_is_not_copied(split: Path, remote: Remote) -> None:
    with (split / "index" / "crc.npy").open("ab") as file:
        file.truncate(1 << 30)  # a hole: it takes no room here
    with pytest.raises(UserError, match=r"crc\.npy has 1,073,741,824 bytes, its 6 values take 24"):
        open_remote(remote)
    copied = Path(remote.cache).rglob("*")
    assert sum(path.stat().st_size for path in copied if path.is_file()) < 10_000


@pytest.mark.parametrize("what", ["a label too high", "an offset that wraps", "a member twice"])
def test_a_remote_index_is_checked_in_full_when_it_is_copied(
    split: Path, remote: Remote, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_files, "_READ_AT_OPEN", 0)
    column, change, message = COLUMN_FAULTS[what]
    forge(split, change, column)
    with pytest.raises(UserError, match=message):
        open_remote(remote)


def test_a_copy_is_called_by_its_name_or_else_file(tmp_path: Path) -> None:
    (tmp_path / ".about.json").write_bytes(b"x")
    assert stat(f"file://{tmp_path}/.about.json").name == "file"
    (tmp_path / "0.tar").write_bytes(b"x")
    assert stat(f"file://{tmp_path}/0.tar").name == "0.tar"


def test_what_was_passed_over_may_be_counted(split: Path) -> None:
    before = open_index(split)
    forge(split, put("passed_over", {"members .txt": 3}))
    assert open_index(split).label.tolist() == before.label.tolist()


@pytest.mark.parametrize("name", ["a.tar", "A.TAR", "a b.tar", "photos-\u00e9.tar", "a..tar"])
def test_names_of_shards(name: str) -> None:
    index_check.check_shard_name(name)


KEYS: dict[str, Any] = {
    "integers": list(range(6)),
    "a null": [*"abcde", None],
    "too few": list("abcde"),
    "bytes": [b"a"] * 6,
    "no UTF-8": pa.array([b"a"] * 5 + [b"\xff"]).view(pa.string()),
}


@pytest.mark.parametrize("what", [*KEYS, "no file", "a cut file", "another column"])
def test_keys_are_verified(split: Path, remote: Remote, what: str) -> None:
    path = split / "index" / "keys.parquet"
    if what == "no file":
        path.unlink()
    elif what == "a cut file":
        path.write_bytes(path.read_bytes()[:-9])
    elif what == "another column":
        pq.write_table(pa.table({"name": list("abcdef")}), path)
    else:
        pq.write_table(pa.table({"key": KEYS[what]}), path)
    index = open_index(split)  # training never reads them
    with pytest.raises(UserError, match=r"keys\.parquet is damaged .*; make it again with"):
        verify_index(index)
    with pytest.raises(UserError, match=r"keys\.parquet"):
        open_remote(remote)


def test_a_remote_folder_of_several_splits_is_no_index(split: Path, remote: Remote) -> None:
    (split / "0.tar").rename(split / "a-train-0.tar")
    (split / "1.tar").rename(split / "a-test-0.tar")
    with pytest.raises(UserError, match=r"file:.* several splits by their names \(test, train\)"):
        build_remote_index(remote)
    (split / "a-test-0.tar").rename(split / "B.TAR")
    (split / "classes.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee\r\ncow\r\n")
    index = build_remote_index(remote)
    assert [shard.name for shard in index.shards] == ["B.TAR", "a-train-0.tar"]
    assert index.classes == ("ant", "bee", "cow")
    (split / "classes.txt").write_bytes(b"\xe2ne\nb\nc\n")
    with pytest.raises(UserError, match=r"classes\.txt is not UTF-8"):
        build_remote_index(remote)
