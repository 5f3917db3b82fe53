"""Random tables: every row is a sample with its own pixels and label, or left out by name.

Files are written in the forms that pyarrow, pandas, Spark and the `datasets` library leave,
consistent ones and ones that contradict each other. What a row shows tells which row it is.
"""

import io
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bigbatch.configs.errors import UserError
from bigbatch.data.index import open_index
from bigbatch.data.writing.kinds import open_source
from bigbatch.data.writing.shard import shard

TABLES = 600
NAMES = ["ant", "bee", "cow", "dog"]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGE_TYPES = (pa.binary(), pa.large_binary(), STRUCT, pa.dictionary(pa.int32(), pa.binary()))
INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64())
TEXTS = (pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()))


@dataclass
class Row:
    """What stands in a row: the name of its class, and its image; None for none."""

    name: str | None
    image: bytes | None


@dataclass
class Case:
    """Files as they were written. `sound` says that nothing in them is open to doubt."""

    rows: list[Row]
    bare: bool = False  # numbers without any names
    sound: bool = True


def picture(row: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (row % 256, row // 256, 7)).save(file, "PNG")
    return file.getvalue()


def some_rows(rng: random.Random, first: int, classes: list[str]) -> list[Row]:
    rows = []
    for i in range(rng.choice((0, 1, 3, 6, 9))):
        image: bytes | None = picture(first + i)
        if rng.random() < 0.1:
            image = rng.choice((None, b"", b"no image", picture(first + i)[:30]))
        rows.append(Row(rng.choice(classes) if rng.random() < 0.9 else None, image))
    return rows


def image_column(kind: pa.DataType, rows: list[Row], path: Path) -> pa.Array:
    if kind != STRUCT:
        images = pa.array(
            [r.image for r in rows], kind.value_type if kind == IMAGE_TYPES[3] else kind
        )
        return images.dictionary_encode() if kind == IMAGE_TYPES[3] else images
    values: list[Any] = []
    for i, row in enumerate(rows):
        values.append({"bytes": row.image, "path": f"{i}.png"} if row.image is not None else None)
        if i % 5 == 4 and row.image:  # held by a file beside the table
            name = f"{path.stem}-{i}.png"
            (path.parent / name).write_bytes(row.image)
            values[-1] = {"bytes": None, "path": name}
    return pa.array(values, STRUCT)


def write_file(
    rng: random.Random,
    path: Path,
    rows: list[Row],
    names: list[str] | None,
    order: list[str] | None,
) -> None:
    """One file: labels as text where `order` is None, else as numbers of that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if order is None:
        kind = rng.choice(TEXTS)
        plain = pa.string() if pa.types.is_dictionary(kind) else kind
        labels = pa.array([r.name for r in rows], plain)
        labels = labels.dictionary_encode() if pa.types.is_dictionary(kind) else labels
    else:
        kind = rng.choice(INTEGERS)
        none = rng.choice((None, -1)) if pa.types.is_signed_integer(kind) else None
        labels = pa.array([none if r.name is None else order.index(r.name) for r in rows], kind)
    table = pa.table({"image": image_column(rng.choice(IMAGE_TYPES), rows, path), "label": labels})
    if rng.random() < 0.3:
        table = table.append_column("caption", pa.array(["x"] * len(rows)))
    if names is not None and rng.random() < 0.5:
        table = table.replace_schema_metadata({"class_names": ",".join(names)})
    elif names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        noted = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": noted})
    if path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=rng.choice((1, 4, 1000)))
        return
    pq.write_table(
        table,
        path,
        row_group_size=rng.choice((1, 2, 4, 1000)),
        compression=rng.choice(("none", "snappy", "zstd", "gzip")),
        use_dictionary=rng.choice((True, False)),
        data_page_version=rng.choice(("1.0", "2.0")),
        # Without it, types come from Parquet alone, and the metadata are lost.
        store_schema=names is not None or rng.random() < 0.7,
    )


def make(rng: random.Random, root: Path) -> Case:
    """Files of one source below `root`, in one of the layouts, and what is right for them."""
    classes = NAMES[: rng.randint(2, 4)]
    style = rng.choice(("text", "bare", "same", "orders", "one", "mixed", "extra", "bare and text"))
    saved = rng.random() < 0.25
    layout = rng.choice(("{s}-{i}.parquet", "{s}/{i}.parquet", "{s}.parquet/part-{i}.PARQUET"))
    places = [
        layout.format(s=s, i=i) for i, s in enumerate(sorted(rng.choices(("test", "train"), k=3)))
    ]
    if saved:
        places = [f"data-{i:05d}-of-00003.arrow" for i in range(3)]
    case = Case([], bare=style == "bare")
    for i, place in enumerate(sorted(places)):
        own, order, names = classes, list(classes), list(classes)
        if style in ("orders", "mixed"):
            rng.shuffle(order)
            names = order
        if style == "extra" and i == 1:
            own = order = names = [*classes, "fox"]
        rows = some_rows(rng, len(case.rows), own)
        text = (
            style == "text"
            or (style == "mixed" and i == 1)
            or (style == "bare and text" and i == 2)
        )
        unnamed = style in ("text", "bare", "bare and text") or (style == "one" and i != 1)
        write_file(
            rng, root / place, rows, None if unnamed or text else names, None if text else order
        )
        case.rows += rows
    case.sound = style not in ("extra", "bare and text") and any(r.name for r in case.rows)
    if saved:
        state = {"_data_files": [{"filename": place} for place in sorted(places)]}
        (root / "state.json").write_text(json.dumps(state))
    return case


def kind_of(root: Path) -> str | None:
    """What `--kind` has to say: rows may name images that lie beside the tables."""
    if not any(path.suffix == ".png" for path in root.rglob("*")):
        return None
    return "dataset" if (root / "state.json").exists() else "parquet"


def opened(root: Path) -> tuple[Any, str]:
    """The source, or why it was refused."""
    try:
        return open_source(str(root), kind=kind_of(root)), ""
    except UserError as refusal:
        return None, str(refusal)


def check(case: Case, root: Path, dest: Path | None) -> bool:
    """Whether the source was read; what was read is right."""
    source, refusal = opened(root)
    if source is None:
        assert not case.sound, refusal
        assert re.search(r"\.(parquet|arrow)\b|no row has a label", refusal, re.IGNORECASE)
        return False
    labelled = {f"{i:08d}": row for i, row in enumerate(case.rows) if row.name is not None}
    assert source.keys == list(labelled)
    # The first five are listed, of at most nine in a file.
    left_out = [
        re.findall(r"(?:rows? |, )(\d+)| and (\d+) more", what)
        for what, why in source.skipped
        if why == "no label"
    ]
    said = [int(more) if more else 1 for found in left_out for _, more in found]
    assert sum(said) == len(case.rows) - len(labelled)
    beside = "an image beside the tables: read where a row names it"
    assert {reason for _, reason in source.skipped} <= {"no label", beside}
    for i, (key, row) in enumerate(labelled.items()):
        named = NAMES[int(source.classes[source.labels[i]])] if case.bare else None
        assert (named or source.classes[source.labels[i]]) == row.name
        if row.image is None:
            with pytest.raises(OSError, match="no image in this row"):
                source.read(i)
        else:
            assert source.read(i) == row.image, key
    if dest is not None and any(r.name and r.image == picture(i) for i, r in enumerate(case.rows)):
        report = shard(str(root), dest, kind=kind_of(root), progress=False)
        written: dict[str, str] = {}
        for split in report.samples:
            index = open_index(dest / split)
            for key, label in zip(index.keys(), index.label, strict=True):
                written[key] = index.classes[label]
        bad = {key for key, _ in report.skipped}
        for key, row in labelled.items():
            good = row.image == picture(int(key))
            assert good == (key in written) == (key not in bad)
            if good and not case.bare:
                assert written[key] == row.name
    return True


@pytest.mark.slow
def test_every_row_is_a_sample_or_left_out_by_name(tmp_path: Path) -> None:
    read = 0
    for seed in range(TABLES):
        root = tmp_path / str(seed)
        root.mkdir()
        case = make(random.Random(seed), root)
        try:
            read += check(case, root, tmp_path / f"{seed}-shards" if seed % 12 == 0 else None)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert read > TABLES / 2


def test_some_tables(tmp_path: Path) -> None:
    for seed in range(TABLES, TABLES + 25):
        root = tmp_path / str(seed)
        root.mkdir()
        check(make(random.Random(seed), root), root, None)
