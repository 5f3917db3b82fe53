"""A fit of measured training costs, from a CSV file. Free of torch."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigbatch.configs.errors import UserError, reason_of
from bigbatch.trainers.advice.critical_batch import Array, CostCurve, fit_points, held_out_errors


@dataclass(frozen=True)
class PointsAdvice:
    batch: Array  # [n]
    cost: Array  # [n], in the unit of the file's column
    unit: str
    fitted: list[bool]  # [n], False for points held out
    curve: CostCurve
    errors: Array  # [n], of the curve, relative
    left_out_errors: Array  # [n], each from a fit without that point; NaN where held out anyway


def advise_points(path: Path, hold_out: tuple[float, float] | None = None) -> PointsAdvice:
    """Fit the points of a CSV file; those with a batch size in `hold_out`, ends included, not."""
    batch, cost, unit = read_points(path)
    low, high = hold_out or (math.inf, -math.inf)
    fitted = (batch < low) | (batch > high)
    if hold_out and fitted.all():
        raise UserError(f"--hold-out {low:g}:{high:g} names no point of {path}")
    sizes = len(set(batch[fitted].tolist()))
    if sizes < 3:
        left = " outside --hold-out" if hold_out else ""
        raise UserError(
            f"--points {path}: points at {sizes} different batch sizes{left}; two parameters and "
            "their intervals need at least 3"
        )
    curve = fit_points(batch[fitted], cost[fitted])
    left_out = np.full(len(batch), np.nan)
    if len(set(batch[fitted].tolist())) > 3:
        left_out[fitted] = held_out_errors(batch[fitted], cost[fitted])
    errors = (curve.floor + curve.slope * batch) / cost - 1
    return PointsAdvice(batch, cost, unit, fitted.tolist(), curve, errors, left_out)


def read_points(path: Path) -> tuple[Array, Array, str]:
    """Batch sizes, costs, and the name of the costs' column, in ascending batch size.

    The columns are batch, batch_size or global_batch, and epochs, samples or a name
    with `epochs_to` in it, such as epochs_to_75.9. Others are ignored.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins with a mark
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        remedy = "give a CSV file that can be read"
        raise UserError(f"cannot read --points {path}: {reason_of(error)}; {remedy}") from None
    batches = [n for n in names if n in ("batch", "batch_size", "global_batch")]
    costs = [n for n in names if n in ("epochs", "samples") or "epochs_to" in n]
    if len(batches) != 1 or len(costs) != 1:
        raise UserError(
            f"--points {path} has columns {names}; it needs, parted by commas, exactly one of "
            "batch, batch_size, global_batch, and one of epochs, samples, or a name with epochs_to "
            "in it"
        )
    points = []
    for row in rows:
        try:
            point = float(row[batches[0]]), float(row[costs[0]])
        except (TypeError, ValueError):
            point = math.nan, math.nan
        if None in row:  # such as 256,10,5 where 10.5 was meant
            raise UserError(
                f"--points {path}: the row of batch {row[batches[0]]} has more than the "
                f"{len(names)} columns named at the top; mend it (numbers are written 10.5)"
            )
        if not all(0 < value < math.inf for value in point):
            shown = [row[batches[0]], row[costs[0]]]
            raise UserError(f"--points {path}: {shown} is not two numbers above 0; mend that row")
        points.append(point)
    points.sort()
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1], costs[0]
