"""What a model says of each sample of a split, beside evaluation.json; two of them joined by key.

A row of outcomes.parquet for each sample:

    key       the sample's key, or its path
    target    the name of its class
    label     the name of the class that is predicted
    p_target  the probability of the target, float64, as served: at the ensemble's temperature

Where two classes have one name, all have their numbers behind it. Free of torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bigbatch.configs.files import appearing
from bigbatch.trainers.evaluation.outcomes import Array, Outcomes, losses_of
from bigbatch.trainers.evaluation.paired import bootstrap, mcnemar
from bigbatch.trainers.recovery.stored import measure

OUTCOMES = "outcomes.parquet"
_ROWS = 2**16  # of a row group: what is held beside keys and outcomes
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "target", "label")),
        ("p_target", pa.float64()),
    ]
)


def write_outcomes(
    folder: Path, keys: Sequence[str], classes: Sequence[str], found: Outcomes
) -> str:
    """Write outcomes.parquet, which appears whole or not at all; returns its SHA-256.

    `keys` [N] in the order of `found`, `classes` by number. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / OUTCOMES
    names = pa.array(_apart(classes), pa.string())
    with appearing(path) as temporary, pq.ParquetWriter(temporary, _SCHEMA) as writer:
        for first in range(0, len(found), _ROWS):
            rows = slice(first, first + _ROWS)
            columns = [
                pa.array(keys[rows], pa.string()),
                names.take(pa.array(found.label[rows])),
                names.take(pa.array(found.predicted[rows])),
                pa.array(found.chosen[rows]),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA))
    return str(measure(path)["sha256"])


def _apart(classes: Sequence[str]) -> list[str]:
    """Names that tell classes apart: of ImageNet's two are called crane."""
    if len(set(classes)) == len(classes):
        return list(classes)
    return [f"{name} #{number}" for number, name in enumerate(classes)]


@dataclass(frozen=True, eq=False)
class BySample:
    """Rows of outcomes.parquet, N samples in any order."""

    keys: pa.ChunkedArray  # of strings, none twice
    targets: pa.ChunkedArray  # of strings
    correct: NDArray[np.bool_]
    losses: Array  # negative log-likelihood, in nats

    def __len__(self) -> int:
        return len(self.losses)


def read_outcomes(folder: Path, sha256: str) -> BySample:
    """The outcomes that an evaluation.json with this `outcomes_sha256` was written with.

    Raises OSError, and ValueError, in a line, where they are others.
    """
    path = folder / OUTCOMES
    if measure(path)["sha256"] != sha256:
        raise ValueError(f"{OUTCOMES} is not what evaluation.json was written with")
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(f"{OUTCOMES} is none ({str(error).splitlines()[0]})") from None
    if table.schema != _SCHEMA or any(column.null_count for column in table.columns):
        raise ValueError(f"{OUTCOMES} has other columns than {', '.join(_SCHEMA.names)}")
    if pc.count_distinct(table["key"]).as_py() != len(table):
        raise ValueError(f"{OUTCOMES} has a key twice")
    return BySample(
        table["key"],
        table["target"],
        pc.equal(table["target"], table["label"]).to_numpy(),
        losses_of(table["p_target"].to_numpy()),
    )


def compare_by_sample(a: BySample, b: BySample, seed: int = 0) -> dict[str, Any]:
    """B against A over the samples whose key both have, in the order of the keys.

    So it goes neither by the order of rows nor by samples of one alone, which are counted.
    Differences are B's mean less A's, with 95 % intervals of a paired bootstrap keyed by `seed`.
    Raises ValueError where no key is in both, or one stands for different targets.
    """
    places = pc.index_in(a.keys, value_set=b.keys.combine_chunks())
    mine = np.flatnonzero(places.is_valid().to_numpy())
    others = places.drop_null().to_numpy()
    if not len(mine):
        raise ValueError("no key of A is one of B: these are other samples")
    order = pc.sort_indices(a.keys.take(pa.array(mine))).to_numpy()
    mine, others = mine[order], others[order]
    _check_targets(a, b, mine, others)
    right, wrong = (a.correct[mine], b.correct[others]), (a.losses[mine], b.losses[others])
    columns = [right[1].astype(np.float64) - right[0], wrong[1] - wrong[0]]
    intervals = bootstrap(np.stack(columns, axis=1), seed)
    counts = mcnemar(*right)
    found: dict[str, Any] = {
        "samples": {"both": len(mine), "A": len(a) - len(mine), "B": len(b) - len(mine)}
    }
    for name, values, column, interval in zip(
        ("accuracy", "nll"), (right, wrong), columns, intervals, strict=True
    ):
        found[name] = {
            "A": float(values[0].mean()),
            "B": float(values[1].mean()),
            "difference": float(column.mean()),
            "interval": interval.tolist(),
        }
    found["mcnemar"] = {
        "only_A": counts.only_first,
        "only_B": counts.only_second,
        "p_value": counts.p_value,
    }
    return found


def _check_targets(
    a: BySample, b: BySample, mine: NDArray[np.int64], others: NDArray[np.int64]
) -> None:
    ours, theirs = a.targets.take(pa.array(mine)), b.targets.take(pa.array(others))
    differ = np.flatnonzero(~pc.equal(ours, theirs).to_numpy())
    if len(differ):
        first = int(differ[0])
        raise ValueError(
            f"{len(differ):,} of {len(mine):,} keys stand for another target in A than in B, such "
            f"as {a.keys[int(mine[first])].as_py()}: {ours[first].as_py()} in A, "
            f"{theirs[first].as_py()} in B"
        )
