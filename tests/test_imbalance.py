"""The long-tailed data of benchmarks/imbalance.py: exactly the intended counts, no leak."""

import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bigbatch.data.writing.kinds import open_source

CLASSES = ("cube", "ball", "cone")
TRAIN, TEST = 30, 8  # images of each class in the source


@pytest.fixture(scope="module")
def imbalance() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")  # as for a script there
        yield importlib.import_module("imbalance")


def write_source(path: Path, order: np.random.Generator | None = None) -> Path:
    """Images of noise, all different; rows in a fixed order, or shuffled by `order`."""
    noise = np.random.default_rng(0)
    rows = []
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label in range(len(CLASSES)):
            for _ in range(count):
                file = io.BytesIO()
                Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(file, "JPEG")
                rows.append({"split": split, "label": label, "jpeg": file.getvalue()})
    if order is not None:
        order.shuffle(rows)
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"class_names": ",".join(CLASSES)})
    # Splits as a dictionary column, which pandas and others write.
    table = table.set_column(0, "split", table["split"].dictionary_encode())
    pq.write_table(table, path)
    return path


def images(path: Path) -> dict[str, list[tuple[int, bytes]]]:
    """(label, image) of every row, by split."""
    found: dict[str, list[tuple[int, bytes]]] = {}
    for row in pq.read_table(path).to_pylist():
        found.setdefault(row["split"], []).append((row["label"], row["jpeg"]))
    return found


def test_the_profile_is_that_of_the_paper(imbalance: ModuleType) -> None:
    counts = imbalance.long_tail_counts(5000, 10, 100.0)
    assert counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert counts.sum() == 12_406


@pytest.mark.parametrize("ratio", [1.0, 10.0, 50.0, 200.0])
def test_the_profile_ends_at_the_ratio(imbalance: ModuleType, ratio: float) -> None:
    counts = imbalance.long_tail_counts(4800, 7, ratio)
    assert (counts[0], counts[-1]) == (4800, 4800 // ratio)
    assert (np.diff(counts) <= 0).all()


def test_each_split_has_the_intended_counts_and_shares_no_image(
    imbalance: ModuleType, tmp_path: Path
) -> None:
    source, dest = write_source(tmp_path / "source.parquet"), tmp_path / "tail.parquet"
    counts = imbalance.write_long_tail(source, dest, train=[24, 7, 2], val=5, test=6)
    assert counts == {"train": [24, 7, 2], "val": [5, 5, 5], "test": [6, 6, 6]}
    before, after = images(source), images(dest)
    for split, wanted in counts.items():
        assert np.bincount([label for label, _ in after[split]]).tolist() == wanted
    assert set(after["train"]) | set(after["val"]) <= set(before["train"])
    assert set(after["test"]) <= set(before["test"])
    assert len({image for rows in after.values() for image in rows}) == 33 + 15 + 18


def test_the_choice_does_not_depend_on_the_order_of_rows(
    imbalance: ModuleType, tmp_path: Path
) -> None:
    chosen = []
    for number, order in enumerate((None, np.random.default_rng(1))):
        source, dest = tmp_path / f"source{number}.parquet", tmp_path / f"tail{number}.parquet"
        write_source(source, order)
        imbalance.write_long_tail(source, dest, train=[9, 3, 1], val=2, test=4)
        chosen.append({split: sorted(rows) for split, rows in images(dest).items()})
    assert chosen[0] == chosen[1]


def test_sharding_finds_splits_labels_and_class_names(
    imbalance: ModuleType, tmp_path: Path
) -> None:
    source, dest = write_source(tmp_path / "source.parquet"), tmp_path / "tail.parquet"
    imbalance.write_long_tail(source, dest, train=[10, 3, 1], val=2, test=4)
    opened = open_source(str(dest))
    assert opened.classes == CLASSES
    assert opened.splits is not None
    train = opened.labels[opened.splits == "train"]
    assert np.bincount(train).tolist() == [10, 3, 1]
    rows = images(dest)["train"] + images(dest)["val"] + images(dest)["test"]
    read = [(int(label), opened.read(i)) for i, label in enumerate(opened.labels)]
    assert sorted(read) == sorted(rows)


def test_too_few_images_are_refused(imbalance: ModuleType, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.parquet")
    with pytest.raises(ValueError, match=r"class 0 has 30 images in train, but 31 are needed"):
        imbalance.write_long_tail(source, tmp_path / "x.parquet", train=[29, 1, 1], val=2, test=1)
