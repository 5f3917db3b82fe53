"""What a safetensors file says of itself: its tensors, and what our weights were trained for.

Free of torch: `bigbatch check` reads it too. Source of the format: its description,
github.com/huggingface/safetensors.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.configs.json_text import parse_json
from bigbatch.configs.schema import Recipe
from bigbatch.configs.size import Size

METADATA = "__metadata__"
COMPRESSION = "compression"  # of the metadata: by which method; absent from a model's plain weights
_KEY = "bigbatch"  # of the metadata
_MAX_HEADER = 100_000_000  # bytes, as in the format's own reader
_MOST_DIMENSIONS = 64
WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


@dataclass(frozen=True)
class WeightsInfo:
    """What weights take and give: travels with every file of weights that is written here."""

    model: str  # timm's name
    classes: tuple[str, ...]  # by number
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    image_size: Size  # of training
    channels: int


class Entry(NamedTuple):
    """One tensor of a file: its dtype in the format's words, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, and its metadata."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def describe(recipe: Recipe, classes: Sequence[str]) -> WeightsInfo:
    """What the weights are that a recipe trains on data of these classes."""
    data, augment = recipe.data, recipe.augment
    return WeightsInfo(
        model=recipe.model.name,
        classes=tuple(classes),
        mean=tuple(augment.pixel_mean),
        std=tuple(augment.pixel_std),
        image_size=data.image_size,
        channels=data.channels,
    )


def to_metadata(info: WeightsInfo) -> dict[str, str]:
    """As the format keeps it, whose metadata are texts; "pt" is how other libraries know torch."""
    return {"format": "pt", _KEY: to_json(asdict(info))}


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked as a whole against the file's size.

    Raises OSError, and ValueError where it is damaged.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    metadata = header.pop(METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError("its metadata are no texts")
    ranges = sorted(_range(name, entry) for name, entry in header.items())
    end = 0
    for start, stop in ranges:
        if start != end:
            raise ValueError(f"its tensors leave a gap, or overlap, at byte {end:,}")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"its tensors take {end:,} bytes, {size - 8 - length:,} are there")
    tensors = {n: Entry(e["dtype"], tuple(e["shape"])) for n, e in header.items()}
    return Header(tensors, metadata)


def _range(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes lie; ValueError where that is not what its shape takes."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!a:.80} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise ValueError(f"tensor {name!a:.80} has dtype {dtype!a:.40}")
    if not (_counts(shape) and len(shape) <= _MOST_DIMENSIONS):
        raise ValueError(f"tensor {name!a:.80} has shape {shape!a:.80}")
    if not (_counts(offsets) and len(offsets) == 2):
        raise ValueError(f"tensor {name!a:.80} has data_offsets {offsets!a:.80}")
    if offsets[1] - offsets[0] != math.prod(shape) * WIDTHS[dtype]:
        raise ValueError(f"tensor {name!a:.80} of shape {shape!a:.80} has other bytes: {offsets}")
    return offsets[0], offsets[1]


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def read_info(header: Header) -> WeightsInfo | None:
    """What the weights were trained for; None where the file does not say it.

    Raises ValueError where it says what cannot be.
    """
    if _KEY not in header.metadata:
        return None
    found = parse_json(header.metadata[_KEY])
    names = {field.name for field in fields(WeightsInfo)}
    if not isinstance(found, dict) or names - found.keys():
        raise ValueError("its description lacks what weights are trained for")
    found = {name: found[name] for name in names}  # a later version may say more
    texts = isinstance(found["model"], str) and _list_of(found["classes"], str)
    numbers = _list_of(found["mean"], float | int) and _list_of(found["std"], float | int)
    if not (texts and numbers and _counts([*_sides(found["image_size"]), found["channels"]])):
        raise ValueError("its description of what weights are trained for is damaged")
    lists: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}
    return WeightsInfo(**lists)


def _sides(size: Any) -> list[Any]:
    return size if isinstance(size, list) and len(size) == 2 else [size]


def _list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def open_weights(path: Path) -> WeightsInfo | None:
    """Look at weights to start from, without reading them; UserError where they are damaged.

    Of a file that is no safetensors only its presence is looked at.
    """
    problem = f"model.checkpoint = {path}"
    remedy = "give a file of weights, or leave model.checkpoint out"
    try:
        with path.open("rb"):
            if path.suffix != ".safetensors":
                return None
        header = read_header(path)
        info = read_info(header)
    except OSError as error:
        raise UserError(f"{problem} cannot be read ({error.strerror}); {remedy}") from None
    except ValueError as error:
        raise UserError(f"{problem} is damaged: {error}; {remedy}") from None
    if method := header.metadata.get(COMPRESSION):
        raise UserError(
            f"{problem} was compressed by {method}, so that it holds other tensors than its model "
            "has; give the weights that it was made of, or fine-tune by `bigbatch compress`"
        )
    return info


def differences(there: WeightsInfo, here: WeightsInfo) -> list[str]:
    """In what weights were trained otherwise than this run will use them, with remedies."""
    found = []
    for name in ("mean", "std"):
        then, now = list(getattr(there, name)), list(getattr(here, name))
        if then != now:
            found.append(
                f"they were trained with augment.{name} = {then}, this run has {now}: features "
                f"shift; set augment.{name}={then}, unless that is wanted"
            )
    for name in ("channels", "image_size"):
        then, now = (_plain(getattr(info, name)) for info in (there, here))
        if then != now:
            found.append(
                f"they were trained with data.{name} = {then}, this run has {now}; set "
                f"data.{name}={then}, unless that is wanted"
            )
    if problem := other_classes(there, here):
        found.append(problem)
    return found


def _plain(value: Any) -> Any:
    """As a recipe writes it."""
    return list(value) if isinstance(value, tuple) else value


def unlike(there: Sequence[str], here: Sequence[str], whose: str) -> str | None:
    """How classes are not those of somebody, named by `whose`; None where they are."""
    if tuple(there) == tuple(here):
        return None
    if sorted(there) != sorted(here):
        return f"other classes than {whose} ({len(there):,} and {len(here):,})"
    place = next(i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
    return (
        f"the classes of {whose} in another order: number {place} is {there[place]!a:.60} there, "
        f"{here[place]!a:.60} here"
    )


def check_same(file: str, there: WeightsInfo | None, here: WeightsInfo, what: str) -> None:
    """Raise ValueError where a file says that it was trained otherwise than `what` says."""
    if there is not None and there != here:
        odd = [key for key, value in vars(there).items() if value != getattr(here, key)]
        raise ValueError(f"{file} was trained with another {' and '.join(odd)} than {what}")


def shared_classes(there: WeightsInfo, here: WeightsInfo) -> list[tuple[int, int]]:
    """(number here, number there) of each class that this run has and the weights know, by name."""
    numbers = {name: number for number, name in enumerate(there.classes)}
    return [(i, numbers[name]) for i, name in enumerate(here.classes) if name in numbers]


def other_classes(there: WeightsInfo, here: WeightsInfo) -> str | None:
    """Why the classifier of these weights is not this run's as it is; None where it is."""
    then, now = there.classes, here.classes
    if then == now:
        return None
    if sorted(then) == sorted(now):
        what = "are the same in another order"
    else:
        what = f"are others ({len(then):,} and {len(now):,} of them)"
    place = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), None)
    if place is not None:
        what += f": number {place} is {then[place]!a:.60} there, {now[place]!a:.60} here"
    rows = shared_classes(there, here)
    if not rows:
        return f"their classes {what}; the classifier starts fresh"
    new = [name for name in now if name not in set(then)]
    rest = f"; those of {_few(new)} start fresh" if new else ""
    unused = [name for name in then if name not in set(now)]
    rest += f"; those of {_few(unused)} are left over" if unused else ""
    return (
        f"their classes {what}; the classifier's rows of {len(rows):,} classes are taken by name"
        f"{rest}"
    )


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name!a:.60}" for name in names[:3])
    return f"{shown} and {len(names) - 3:,} more" if len(names) > 3 else shown
