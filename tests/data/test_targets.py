"""Numbers beside labels: read from archives, indexed, checked, and brought into micro-batches."""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.configs.errors import UserError
from bigbatch.data.batch import MicroBatch
from bigbatch.data.classes import UNLABELLED
from bigbatch.data.index import BadShards, Index, build_index, open_index, some_samples
from bigbatch.data.listing import open_listing
from bigbatch.data.loader import eval_batches
from bigbatch.data.remote import open_remote
from bigbatch.data.remote_index import build_remote_index
from bigbatch.data.samples import scan_shard
from bigbatch.data.staging import Remote
from bigbatch.data.targets import (
    check_distributions,
    encode_target,
    join_targets,
    mean_and_std,
    target_json,
    target_numbers,
)
from tests.data.test_index_check import forge
from tests.helpers.archives import pack
from tests.helpers.micro_batches import DECODING, batches_of, damage, image_bytes

Member = tuple[str, bytes]


def npy(value: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(value), allow_pickle=True)
    return file.getvalue()


def sample(key: str, target: Any = None, label: int | None = None) -> list[Member]:
    found = [(f"{key}.jpg", b"picture" + key.encode())]
    if label is not None:
        found.append((f"{key}.cls", str(label).encode()))
    if target is not None:
        found.append((f"{key}.target.json", json.dumps(target).encode()))
    return found


@pytest.mark.parametrize(
    ("members", "numbers"),
    [
        ({}, []),
        ({"cls": b"3"}, []),
        ({"target.json": b"41.5"}, [41.5]),
        ({"target.json": b" [1, -2.5e-3] "}, [1, -2.5e-3]),
        ({"target.npy": npy(np.float64(0.1))}, [0.1]),
        ({"target.npy": npy(np.arange(3, dtype=">i2"))}, [0, 1, 2]),
        ({"target.npy": npy(np.float16([0.5, 2]))}, [0.5, 2]),
    ],
)
def test_targets_are_read_as_float32(members: dict[str, bytes], numbers: list[float]) -> None:
    found = np.frombuffer(target_numbers(members), np.float32)
    np.testing.assert_array_equal(found, np.float32(numbers))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"target.json": b"x"}, r"no target in \.target\.json"),
        ({"target.json": b'"41"'}, "'?41'? is neither a number nor a list"),
        ({"target.json": b"true"}, "True is neither"),
        ({"target.json": b"null"}, "None is neither"),
        ({"target.json": b"[1, null]"}, "neither a number"),
        ({"target.json": b"[[1]]"}, "neither a number"),
        ({"target.json": b"[]"}, "0 numbers"),
        ({"target.json": b"NaN"}, "not finite"),
        ({"target.json": b"[1, Infinity]"}, "not finite"),
        ({"target.json": b"1e39"}, "beyond what float32 holds"),
        ({"target.json": b"1" + b"0" * 5000}, "target"),
        ({"target.json": json.dumps([0.5] * 65537).encode()}, "65,537 numbers"),
        ({"target.npy": b"x"}, "no array of numbers"),
        ({"target.npy": npy([{}])}, "no array of numbers"),  # would be unpickled
        ({"target.npy": npy([["a"]])}, "neither a number"),
        ({"target.npy": npy([[1.0, 2.0]])}, "neither a number"),
        ({"target.npy": npy([1.0, math.nan])}, "not finite"),
        ({"target.json": b"1", "target.npy": npy(1.0)}, "has two targets"),
    ],
)
def test_what_is_no_target_says_why(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_numbers(members)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_what_shard_writes_is_what_was_given(values: list[float]) -> None:
    numbers = encode_target(values)
    assert target_numbers({"target.json": target_json(numbers)}) == numbers


def test_webdatasets_own_decoders_read_them(tmp_path: Path) -> None:
    import webdataset as wds

    rows = [sample("a", 41.5, 0), [("b.jpg", b"x"), ("b.target.npy", npy(np.float32([1, 2])))]]
    path = pack(tmp_path / "0.tar", *rows[0], *rows[1])
    found = list(wds.WebDataset(str(path), shardshuffle=False).decode())
    assert found[0]["target.json"] == 41.5
    np.testing.assert_array_equal(found[1]["target.npy"], np.float32([1, 2]))


def test_an_index_holds_them_beside_labels(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", *sample("a", [0.1, 7], 1), *sample("b", [2, 3], 0))
    pack(tmp_path / "1.tar", *sample("c", [4, 5], 1))
    made = build_index(tmp_path)
    index = open_index(tmp_path)
    assert index.target is not None
    assert index.target.dtype == np.float32
    np.testing.assert_array_equal(index.target, np.float32([[0.1, 7], [2, 3], [4, 5]]))
    assert index.label.tolist() == [1, 0, 1]
    assert index.passed_over == {}
    part = some_samples(index, np.array([2, 0]))
    np.testing.assert_array_equal(part.target, np.float32([[4, 5], [0.1, 7]]))
    pack(tmp_path / "1.tar", *sample("c", [4, 6], 1))
    assert build_index(tmp_path).hash != made.hash  # targets count as data do


def test_an_index_without_targets_is_as_it_was(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", *sample("a", None, 1), *sample("b", None, 0))
    assert build_index(tmp_path).target is None
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert "targets" not in manifest
    assert "target" not in manifest["columns"]


def test_samples_with_targets_alone_are_of_one_class(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", *sample("a", 0.5), *sample("b", 2))
    index = build_index(tmp_path)
    assert index.classes == UNLABELLED
    assert index.label.tolist() == [0, 0]
    assert index.target is not None
    assert index.target.shape == (2, 1)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (sample("b", None, 0), r"'b' has no target \(.target.json\), and others have"),
        (sample("b", [1, 2], 0), "'b' has a target of 2 numbers, others of 1"),
        (sample("b", 1.0), "'b' has no label"),
        (sample("b", "x", 0), "'b' has no target in .target.json: x is neither"),
        ([("b.target.json", b"1")], r"'b' has a target and no image \(only .target.json\)"),
    ],
)
def test_a_sample_without_its_target_is_a_problem_by_name(
    tmp_path: Path, second: list[Member], message: str
) -> None:
    pack(tmp_path / "0.tar", *sample("a", 0.5, 1), *second, *sample("c", 0.25, 0))
    with pytest.raises(BadShards, match=message):
        build_index(tmp_path)
    index = build_index(tmp_path, skip_bad=True)
    assert index.keys() == ["a", "c"]
    assert index.target is not None
    assert index.target.tolist() == [[0.5], [0.25]]
    assert len(index.problems) == 1


def test_an_entry_of_the_json_may_be_the_target(tmp_path: Path) -> None:
    rows = [("a.jpg", b"x"), ("a.json", b'{"label": 1, "age": 41.5}')]
    rows += [("b.jpg", b"x"), ("b.json", b'{"label": 1, "age": "old"}')]
    rows += [("c.jpg", b"x"), ("c.json", b'{"label": 1}')]
    scan = scan_shard(pack(tmp_path / "0.tar", *rows), target_key="age")
    assert scan.targets == [np.float32(41.5).tobytes()]
    assert [why for _, why in scan.problems] == [
        "sample 'b' has no target in .json (age: old is neither a number nor a list of numbers)",
        "sample 'c' has no target (.json with `age`)",
    ]
    assert scan_shard(tmp_path / "0.tar").targets == [b"", b"", b""]


def test_images_to_predict_need_no_target(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", *sample("a", "x"), *sample("b", 1, 0))
    listing = open_listing(str(tmp_path / "0.tar"), ("0", "1"))
    assert listing.keys == ["a", "b"]
    assert not listing.unreadable


def test_the_most_frequent_length_is_the_right_one() -> None:
    found = [encode_target(x) for x in ([1, 2], [3, 4], 5)]
    column, problems = join_targets([*found, b""])
    assert column is not None
    np.testing.assert_array_equal(column, [[1, 2], [3, 4], [0, 0], [0, 0]])
    assert [i for i, _ in problems] == [2, 3]
    assert join_targets([b"", b""]) == (None, [])


@pytest.fixture
def split(tmp_path: Path) -> Path:
    rows = [member for i in range(6) for member in sample(str(i), [i, 0.5], i % 2)]
    pack(tmp_path / "shards" / "0.tar", *rows)
    build_index(tmp_path / "shards")
    return tmp_path / "shards"


def set_nan(values: Any) -> None:
    values[4, 1] = math.nan


FAULTS = {
    "not finite": ("target", set_nan, "the target of sample 4 is not finite"),
    "a number less": ("target", lambda v: v[:, :1].copy(), r"it holds float32 \(6, 1\)"),
    "a row less": ("target", lambda v: v[1:].copy(), r"it holds float32 \(5, 2\)"),
    "float64": ("target", lambda v: v.astype(np.float64), "it holds float64"),
    "no number": (None, lambda m: m.update(targets=0), "targets = 0"),
    "no count": (None, lambda m: m.update(targets="2"), "targets = '2'"),
    "one more": (None, lambda m: m.update(targets=3), r"it holds float32 \(6, 2\)"),
    "unsaid": (None, lambda m: m.pop("targets"), "columns has 'target', which no index has"),
    "no column": (None, lambda m: m["columns"].pop("target"), "columns has no target"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_damaged_column_is_one_message(split: Path, what: str) -> None:
    column, change, message = FAULTS[what]
    forge(split, change, column)
    with pytest.raises(UserError, match=rf"is damaged \({message}.*make it again with"):
        open_index(split)


def test_bytes_that_changed_are_found(split: Path) -> None:
    path = split / "index" / "target.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="its hash is not the one in the manifest"):
        open_index(split)


def test_a_remote_index_has_them_too(split: Path, tmp_path: Path) -> None:
    local = open_index(split)
    store = Path(shutil.copytree(split, tmp_path / "store"))
    shutil.rmtree(store / "index")
    remote = Remote(f"file://{store}", str(tmp_path / "cache"), 10**9)
    assert build_remote_index(remote).hash == local.hash
    index = open_remote(remote)
    assert index.target is not None
    np.testing.assert_array_equal(index.target, local.target)


def test_mean_and_std_are_those_of_the_column() -> None:
    target = np.random.default_rng(0).normal([3, -1e4], [2, 5], (1000, 2)).astype(np.float32)
    mean, std = mean_and_std(target, "train")
    np.testing.assert_allclose(mean, target.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(std, target.astype(np.float64).std(0), rtol=1e-12)
    target[:, 1] = 7
    with pytest.raises(UserError, match="target 1 of train is 7 for all of its 1,000 samples"):
        mean_and_std(target, "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.2, 0.3, 0.5], None),
        ([0.2, 0.3, 0.5004], None),
        ([0.2, 0.3, 0.6], "sample 1 of val is no distribution: its numbers sum to 1.1"),
        ([-0.1, 0.6, 0.5], "the least is -0.1"),
    ],
)
def test_distributions(row: list[float], message: str | None) -> None:
    target = np.float32([[0, 0, 1], row])
    if message is None:
        check_distributions(target, 3, "val")
        with pytest.raises(UserError, match="targets of 3 numbers and 4 classes"):
            check_distributions(target, 4, "val")
        return
    with pytest.raises(UserError, match=message):
        check_distributions(target, 3, "val")


@pytest.fixture
def pictures(tmp_path: Path) -> Index:
    """41 pictures of 3 classes, whose target is their number."""
    rows = []
    for i in range(41):
        rows.append((f"{i:06d}.jpg", image_bytes(i)))
        rows.append((f"{i:06d}.cls", str(i % 3).encode()))
        rows.append((f"{i:06d}.target.json", json.dumps([i, i / 3]).encode()))
    pack(tmp_path / "train" / "0.tar", *rows)
    return build_index(tmp_path / "train")


def belongs(batch: MicroBatch) -> bool:
    assert batch.targets is not None
    own = torch.from_numpy(batch.samples)
    return torch.equal(batch.targets, torch.stack([own, own / 3], 1).float())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_micro_batch_has_those_of_its_samples(pictures: Index, workers: int) -> None:
    batches = list(batches_of(pictures, workers=workers))
    assert all(map(belongs, batches))
    batch = batches[0]
    rows = np.array([2, 0])
    part = batch.part(rows).to(torch.device("cpu"))
    assert batch.targets is not None
    assert part.targets is not None
    assert torch.equal(part.targets, batch.targets[torch.from_numpy(rows)])
    evaluated = list(eval_batches(pictures, DECODING, batch=10, rank=0, world=1))
    assert all(map(belongs, evaluated))


def test_a_substitute_brings_its_own_target(pictures: Index) -> None:
    damage(pictures, (3, 4, 30))
    batches = list(batches_of(pictures, bad_samples=100))
    assert any(batch.bad for batch in batches)
    assert all(map(belongs, batches))
    assert not any(np.isin(batch.samples, (3, 4, 30)).any() for batch in batches)
