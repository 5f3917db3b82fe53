"""Numbers that a sample stands for, beside its label or in place of one.

A target is K numbers: an age, a pose, the shares of classes. In an archive it is
`KEY.target.json`, a number or a list of them, or `KEY.target.npy`, both of which WebDataset's own
`decode()` reads; in an index the column `target`, float32 [N, K]. K is the same for all samples of
an index, and each of them has one, or none has.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.json_text import parse_json

EXTENSIONS = ("target.json", "target.npy")  # of members, behind KEY.
MOST = 1 << 16  # numbers of one sample
_CHUNK = 1 << 20  # numbers that are looked at together
_SUM_TOLERANCE = 1e-3  # of a distribution, which somebody may have rounded to three places

Targets = npt.NDArray[np.float32]  # [N, K]


def target_numbers(members: dict[str, bytes]) -> bytes:
    """The numbers of a sample as float32 bytes, from its members by extension; b"" without any.

    Raises ValueError, which says what is wrong.
    """
    found = [name for name in EXTENSIONS if name in members]
    if not found:
        return b""
    if len(found) > 1:
        raise ValueError(f"has two targets (.{found[0]} and .{found[1]})")
    name = found[0]
    read = _of_json if name.endswith("json") else _of_npy
    try:
        return encode_target(read(members[name]))
    except ValueError as error:
        raise ValueError(f"has no target in .{name}: {error}") from None


def encode_target(value: Any) -> bytes:
    """A number, or a flat list or array of them, as float32 bytes. ValueError where it is none."""
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or array.ndim > 1:
        raise ValueError(f"{str(value)[:40]} is neither a number nor a list of numbers")
    if not 1 <= array.size <= MOST:
        raise ValueError(f"{array.size:,} numbers; give from 1 to {MOST:,}")
    with np.errstate(over="ignore"):
        numbers = array.reshape(-1).astype(np.float32)
    if not np.isfinite(numbers).all():
        odd = array.reshape(-1)[~np.isfinite(numbers)][0]
        raise ValueError(f"{odd} is not finite, or beyond what float32 holds")
    return numbers.tobytes()


def _of_json(text: bytes) -> Any:
    value = parse_json(text)
    flat = value if isinstance(value, list) else [value]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in flat):
        raise ValueError(f"{str(value)[:40]} is neither a number nor a list of numbers")
    return [float(x) if abs(x) < 1e300 else math.inf for x in flat]


def _of_npy(data: bytes) -> Any:
    # Nothing is unpickled; a header is a literal, of which bad ones raise anything.
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise ValueError(f"no array of numbers: {error}") from None


def target_json(numbers: bytes) -> bytes:
    """What `shard` writes: one number, or a list; as many digits as float32 needs."""
    values = [float(str(x)) for x in np.frombuffer(numbers, np.float32)]
    return to_json(values[0] if len(values) == 1 else values).encode()


def join_targets(found: Sequence[bytes]) -> tuple[Targets | None, list[tuple[int, str]]]:
    """The column of samples' numbers, 0 for those that lack them, and (sample, problem) of these.

    None where no sample has any. The most frequent length is the right one.
    """
    sizes = np.array([len(numbers) // 4 for numbers in found], np.int64)
    given = sizes[sizes > 0]
    if not len(given):
        return None, []
    width = int(np.bincount(given).argmax())
    column = np.zeros((len(found), width), np.float32)
    problems = []
    for i, numbers in enumerate(found):
        if sizes[i] == width:
            column[i] = np.frombuffer(numbers, np.float32)
        elif sizes[i]:
            problems.append((i, f"has a target of {sizes[i]:,} numbers, others of {width:,}"))
        else:
            problems.append((i, "has no target (.target.json), and others have"))
    return column, problems


def chunks(target: Targets) -> Sequence[slice]:
    """Slices of rows that cover all, of about a million numbers each."""
    step = max(1, _CHUNK // target.shape[1])
    return [slice(start, start + step) for start in range(0, len(target), step)]


def mean_and_std(target: Targets, place: str) -> tuple[list[float], list[float]]:
    """Of each target, in float64. UserError, which names `place`, where one is constant."""
    total = sum(target[rows].astype(np.float64).sum(0) for rows in chunks(target))
    mean = total / len(target)
    squares = sum(((target[rows] - mean) ** 2).sum(0) for rows in chunks(target))
    std = np.sqrt(squares / len(target))
    if not (std > 0).all():
        constant = int(np.argmin(std > 0))
        raise UserError(
            f"target {constant} of {place} is {mean[constant]:g} for all of its "
            f"{len(target):,} samples: there is nothing to learn; leave it out, or give loss.mean "
            "and loss.std"
        )
    return mean.tolist(), std.tolist()


def check_distributions(target: Targets, classes: int, place: str) -> None:
    """Raise UserError unless each row holds the shares of all classes."""
    if target.shape[1] != classes:
        raise UserError(
            f"{place} has targets of {target.shape[1]:,} numbers and {classes:,} classes; loss kl "
            "learns the shares of the classes: give as many numbers as classes.txt has lines"
        )
    for rows in chunks(target):
        some = target[rows].astype(np.float64)
        sums = some.sum(1)
        bad = (np.abs(sums - 1) > _SUM_TOLERANCE) | (some.min(1) < 0)
        if bad.any():
            at = int(bad.argmax())
            raise UserError(
                f"the target of sample {rows.start + at:,} of {place} is no distribution: its "
                f"numbers sum to {sums[at]:g}, the least is {some[at].min():g}; loss kl needs "
                "shares from 0 on that sum to 1"
            )
