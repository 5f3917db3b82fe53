"""Predictions on the disk: rows in the order of the source, written by ranks and joined by rank 0.

Each rank writes its batches as the row groups of a Parquet file of its own beside the result, so
that memory does not grow with the number of images. Ranks need one file system in common.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from bigbatch.configs.files import appearing, to_json
from bigbatch.trainers.ensemble.combination import Combination
from bigbatch.trainers.evaluation.metrics import Probabilities

_ROWS = 8192  # of a row group of the result, at most
_NUMBERS = 2**22  # in one, about: probabilities of as many classes as there are


class Table:
    """Rows as a table: the columns of a prediction, in the words of the classes.

    `features` adds what goes into the classifier; without `predictions` nothing of the classes is
    there but the target.
    """

    def __init__(
        self,
        classes: Sequence[str],
        combination: Combination,
        metadata: dict[str, Any],
        *,
        features: bool = False,
        predictions: bool = True,
    ) -> None:
        self.classes = np.array(classes, object)
        self.combination = combination
        fields = [
            ("key", pa.string()),
            ("target", pa.string()),
            ("label", pa.string()),
            ("confidence", pa.float32()),
            ("entropy", pa.float32()),
            ("probabilities", pa.list_(pa.float32())),
            ("reason", pa.string()),
        ]
        self._rejects = combination.reject_below is not None
        if self._rejects:
            fields.insert(3, ("rejected", pa.bool_()))
        if not predictions:
            fields = [field for field in fields if field[0] in ("key", "target", "reason")]
        if features:
            fields.append(("features", pa.list_(pa.float32())))
        content = {"bigbatch": to_json({"classes": list(classes), **metadata})}
        self.schema = pa.schema(fields, metadata=content)

    def rows(
        self,
        keys: Sequence[str],
        targets: Sequence[int],
        probabilities: Probabilities,
        reasons: Sequence[str | None],
        features: np.ndarray | None = None,
    ) -> pa.Table:
        """Rows in the order of `keys`; those without a reason take `probabilities` [n, C] in turn.

        `targets` are class numbers, -1 where unknown. Entropy is in nats.
        """
        good = [reason is None for reason in reasons]
        best = probabilities.argmax(axis=1)
        log = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
        columns: dict[str, Sequence[Any]] = {
            "label": self.classes[best].tolist(),
            "confidence": probabilities.max(axis=1).tolist(),
            "entropy": (-(probabilities * log).sum(axis=1)).tolist(),
            "probabilities": list(probabilities.astype(np.float32)),
        }
        if self._rejects:
            columns["rejected"] = (~self.combination.accepted(probabilities)).tolist()
        if features is not None:
            columns["features"] = list(features)
        filled = {name: _spread(values, good) for name, values in columns.items()}
        filled |= {
            "key": list(keys),
            "target": [self.classes[t] if t >= 0 else None for t in targets],
            "reason": list(reasons),
        }
        arrays = [pa.array(filled[field.name], field.type) for field in self.schema]
        return pa.Table.from_arrays(arrays, schema=self.schema)


class NumberTable:
    """The same of numbers [K]: `prediction`, in the targets' unit, beside `target`."""

    def __init__(
        self, outputs: Sequence[str], metadata: dict[str, Any], *, features: bool = False
    ) -> None:
        numbers = pa.list_(pa.float32())
        fields = [("key", pa.string()), ("target", numbers), ("prediction", numbers)]
        fields.append(("reason", pa.string()))
        if features:
            fields.append(("features", numbers))
        content = {"bigbatch": to_json({"outputs": list(outputs), **metadata})}
        self.schema = pa.schema(fields, metadata=content)

    def rows(
        self,
        keys: Sequence[str],
        targets: Sequence[Any],
        predicted: np.ndarray,
        reasons: Sequence[str | None],
        features: np.ndarray | None = None,
    ) -> pa.Table:
        """As of `Table`; `targets` are rows of numbers, or None where unknown."""
        good = [reason is None for reason in reasons]
        filled = {
            "key": list(keys),
            "target": list(targets),
            "prediction": _spread(list(predicted.astype(np.float32)), good),
            "reason": list(reasons),
        }
        if features is not None:
            filled["features"] = _spread(list(features), good)
        arrays = [pa.array(filled[field.name], field.type) for field in self.schema]
        return pa.Table.from_arrays(arrays, schema=self.schema)


def _spread(values: Sequence[Any], good: Sequence[bool]) -> list[Any]:
    left = iter(values)
    return [next(left) if there else None for there in good]


class Part:
    """The rows of one rank: a row group for each of its batches."""

    def __init__(self, folder: Path, rank: int, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(_part(folder, rank), schema)

    def write(self, rows: pa.Table) -> None:
        self._writer.write_table(rows, row_group_size=max(1, len(rows)))

    def close(self) -> None:
        self._writer.close()


def _part(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.parquet"


def join(folder: Path, world: int, batches: int, last: pa.Table, out: Path, width: int = 1) -> int:
    """Write the rows of all batches, and `last` behind them, to `out`; returns how many.

    Batch b is row group b // world of rank b % world; `width` are a row's numbers. The file
    appears whole, or not at all.
    """
    rows = max(1, min(_ROWS, _NUMBERS // width))
    parts = [pq.ParquetFile(_part(folder, rank)) for rank in range(world)]

    def tables() -> Iterator[pa.Table]:
        for batch in range(batches):
            yield parts[batch % world].read_row_group(batch // world)
        yield last

    count = 0
    with appearing(out) as temporary, _writer(temporary, out.suffix, last.schema) as writer:
        for table in _grouped(tables(), rows):
            count += len(table)
            if out.suffix != ".csv":
                writer.write_table(table)
                continue
            for first in range(0, len(table), rows):  # lists of Python's numbers are large
                writer.write_table(_flat(table.slice(first, rows)))
    return count


def _writer(path: Path, suffix: str, schema: pa.Schema) -> Any:
    if suffix == ".parquet":
        return pq.ParquetWriter(path, schema)
    return pa.csv.CSVWriter(str(path), _flat(schema.empty_table()).schema)


def _grouped(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Tables of about so many rows."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= rows:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _flat(table: pa.Table) -> pa.Table:
    """Lists as JSON texts: CSV has no lists."""
    for place, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            texts = [None if v is None else to_json(v) for v in table.column(place).to_pylist()]
            table = table.set_column(place, field.name, pa.array(texts, pa.string()))
    return table
