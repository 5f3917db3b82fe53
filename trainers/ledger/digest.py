"""Digests of tensors on their device: integer operations alone, on a CPU as on a GPU."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigbatch.trainers.ledger.multipliers import (
    MASK,
    multipliers,
    name_key,
    row_words,
    words_per_element,
)

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
# Words. Tensors of fewer are put one after another, so that they cost few calls; of larger ones,
# and of those, so many at once: on a CPU what fits in its cache, on a GPU what keeps it busy.
_SMALL = {"cpu": 1 << 16, "cuda": 1 << 20}
_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 24}
_LIMB = 22  # bits, of which sums over 2^31 ranks are exact in float64
_LIMBS = 3


class Part(NamedTuple):
    """A tensor by name, or a range of a flattened one: from `start` on, of a whole `shape`."""

    name: str
    tensor: Tensor
    start: int
    shape: tuple[int, ...]

    @staticmethod
    def whole(name: str, tensor: Tensor) -> "Part":
        return Part(name, tensor, 0, tuple(tensor.shape))


@dataclass(frozen=True)
class _Block:
    """Words [r, l] of rows from `row` on and columns from `column` on."""

    name: str
    words: Tensor
    row: int
    column: int
    permuted: tuple[int, ...] = ()  # (C, H, W) where the words lie in the order H, W, C


@dataclass(frozen=True)
class _Plan:
    """How a set of tensors is digested, as long as they lie where they lay."""

    signature: list[object]
    together: list[tuple[list[Tensor], Tensor]]  # words of small ones, and all their multipliers
    alone: list[tuple[Tensor, Tensor, Tensor]]  # words [r, l], multipliers [r] and [l]


class Digester:
    """Digests sets of tensors (multipliers.py says what that is), and keeps the multipliers."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, torch.device], Tensor] = {}
        self._plans: dict[str, _Plan] = {}
        self._rooms: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def __call__(self, kind: str, parts: Iterable[Part], device: torch.device) -> Tensor:
        """The sum of the parts' digests modulo 2^64: int64 [] on `device`.

        The parts of a `kind` are usually the same tensors: views of them are kept until others
        come.
        """
        some = [part for part in parts if part.tensor.numel()]
        signature: list[object] = [
            (p.name, p.start, p.tensor.data_ptr(), p.tensor.shape, p.tensor.stride()) for p in some
        ]
        plan = self._plans.get(kind)
        if plan is None or plan.signature != signature:
            plan = self._plans[kind] = self._plan(signature, some)
        sums = [self._together(*small) for small in plan.together]
        sums += [self._alone(*large) for large in plan.alone]
        if not sums:
            return torch.zeros((), dtype=torch.int64, device=device)
        return torch.stack([total.to(device, non_blocking=True) for total in sums]).sum()

    def forget(self, kind: str) -> None:
        """Keep no views of these tensors."""
        self._plans.pop(kind, None)

    def _plan(self, signature: list[object], parts: Sequence[Part]) -> _Plan:
        blocks = [block for part in parts for block in _blocks(part)]
        small: dict[torch.device, list[_Block]] = {}
        alone = []
        for block in blocks:
            device = block.words.device
            if block.words.numel() > _SMALL.get(device.type, _SMALL["cuda"]):
                alone.append((block.words, *self._factors(block)))
            else:
                small.setdefault(device, []).append(block)
        together = []
        for device, of_device in small.items():
            for some in _groups(of_device, _AT_ONCE.get(device.type, _AT_ONCE["cuda"])):
                factors = [rows[:, None] * columns for rows, columns in map(self._factors, some)]
                words = [block.words.reshape(-1) for block in some]
                together.append((words, torch.cat([f.flatten() for f in factors])))
        return _Plan(signature, together, alone)

    def _together(self, words: list[Tensor], multipliers: Tensor) -> Tensor:
        room = self._room(multipliers.device, len(multipliers))
        line = torch.cat([w if w.dtype == torch.int32 else w.to(torch.int32) for w in words])
        return room.copy_(line).mul_(multipliers).sum()

    def _alone(self, words: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        device = words.device
        count, length = words.shape
        at_once = min(count, max(1, _AT_ONCE.get(device.type, _AT_ONCE["cuda"]) // length))
        sums = []
        for some in words.split(at_once):
            room = self._room(device, some.numel()).view(some.shape)
            sums.append(room.copy_(some).mul_(columns).sum(1))
        return torch.cat(sums).mul_(rows).sum()

    def _room(self, device: torch.device, size: int) -> Tensor:
        """Memory for int64 [size], the same in each call: fresh pages cost more than the sums."""
        room = self._rooms.get(device)
        if room is None or len(room) < size:
            room = self._rooms[device] = torch.empty(size, dtype=torch.int64, device=device)
        return room[:size]

    def _factors(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Multipliers of a block's rows [r], the name's among them, and of its columns [l]."""
        device = block.words.device
        count, length = block.words.shape
        columns = self._table("column", block.column + length, device)[block.column :]
        if block.permuted:
            columns = columns.view(block.permuted).permute(1, 2, 0).reshape(-1)
        rows = self._table("row", block.row + count, device)[block.row :]
        return rows * _signed(name_key(block.name)), columns

    def _table(self, kind: str, count: int, device: torch.device) -> Tensor:
        table = self._tables.get((kind, device))
        if table is None or len(table) < count:
            values = multipliers(kind, count).view(np.int64).copy()
            table = self._tables[kind, device] = torch.from_numpy(values).to(device)
        return table[:count]


def _groups(blocks: Sequence[_Block], words: int) -> Iterator[list[_Block]]:
    """The blocks in order, in groups that end with the one that makes them have so many words."""
    group: list[_Block] = []
    for block in blocks:
        group.append(block)
        if sum(b.words.numel() for b in group) >= words:
            yield group
            group = []
    if group:
        yield group


def _blocks(part: Part) -> Iterator[_Block]:
    """A part as rectangles: all of it where whole rows are there, else a first and a last row."""
    tensor = part.tensor.detach()
    size = tensor.element_size()
    length = row_words(part.shape, size)
    words = _as_words(tensor)
    per = words_per_element(size)
    first, count = part.start * per, words.numel()
    if _is_channels_last(words) and count % length == first % length == 0:
        rows = words.permute(0, 2, 3, 1).reshape(-1, length)
        yield _Block(part.name, rows, first // length, 0, tuple(words.shape[1:]))
        return
    flat = words.reshape(-1)
    row, column = divmod(first, length)
    if column:
        some = flat[: length - column]
        yield _Block(part.name, some[None], row, column)
        flat, row = flat[some.numel() :], row + 1
    whole = flat.numel() // length * length
    if whole:
        yield _Block(part.name, flat[:whole].view(-1, length), row, 0)
    if flat.numel() > whole:
        yield _Block(part.name, flat[whole:][None], row + whole // length, 0)


def _is_channels_last(words: Tensor) -> bool:
    if words.ndim != 4 or words.is_contiguous():
        return False
    return words.is_contiguous(memory_format=torch.channels_last)


def _as_words(tensor: Tensor) -> Tensor:
    size = tensor.element_size()
    if size == 4:
        return tensor.view(torch.int32)  # in any memory format
    flat = tensor.reshape(-1)
    return (flat.view(torch.uint8) if flat.dtype == torch.bool else flat).view(_WORDS[size])


def _signed(value: int) -> int:
    """The same 64 bits as torch has them."""
    return value - (1 << 64) if value >> 63 else value


def to_limbs(digests: Tensor) -> Tensor:
    """Digests int64 [k] as float64 [k, 3], whose sums over ranks are exact."""
    mask = (1 << _LIMB) - 1
    limbs = [(digests >> (_LIMB * i)) & mask for i in range(_LIMBS)]
    return torch.stack(limbs, -1).double()


def from_limbs(values: Sequence[float]) -> list[int]:
    """Digests modulo 2^64 from a flat list of sums of limbs."""
    triples = zip(*[iter(values)] * _LIMBS, strict=True)
    return [sum(int(v) << (_LIMB * i) for i, v in enumerate(t)) & MASK for t in triples]


def of_int(value: int, device: torch.device) -> Tensor:
    """A digest that Python has made: int64 []."""
    return torch.tensor(_signed(value & MASK), dtype=torch.int64, device=device)
