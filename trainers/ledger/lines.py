"""The lines of ledger.jsonl: how they are chained, read and checked. Free of torch.

Three kinds of lines, told apart by `kind`:

- step: what a step came to, chained. The same bytes wherever the same is computed.
- start: with which ranks, in which environment, on which data the steps after it were computed.
- records: how many bytes metrics.jsonl had at a save, and their SHA-256.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import iter_jsonl, to_json
from bigbatch.configs.json_text import parse_json

# In the order in which a step makes them.
DIGESTS = ("keys", "loss", "gradient", "weights", "optimizer", "buffers")
FIRST = "bigbatch ledger 1"  # in place of the chain before the first line
_LONGEST = 1 << 16  # bytes of a line; no other one is


def chained(before: str, step: int, digests: dict[str, str]) -> dict[str, Any]:
    """The line of a step: its digests, and a hash over them and over the chain up to there."""
    line = {"kind": "step", "step": step, **digests}
    text = f"{before}\n{to_json(line)}"
    return line | {"chain": hashlib.sha256(text.encode()).hexdigest()[:32]}


def loss_bits(loss: float) -> str:
    """A float64 as the 16 hex digits of its bits."""
    return struct.pack(">d", loss).hex()


def loss_of(bits: str) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(bits))[0]
    return value


def last_chain(path: Path) -> str:
    """The chain up to the last step's line; FIRST without any."""
    for line in iter_jsonl(path, b'"step", "step"', newest_first=True):
        if line.get("kind") == "step" and isinstance(line.get("chain"), str):
            return str(line["chain"])
    return FIRST


@dataclass(frozen=True, slots=True)
class Step:
    """What stands in the ledger of one step, in few bytes: a run may have a million."""

    step: int  # finished steps
    packed: bytes  # 8 of each of DIGESTS
    start: dict[str, Any]  # the last line of kind start before it

    @property
    def digests(self) -> dict[str, str]:
        text = self.packed.hex()
        return {name: text[16 * i : 16 * i + 16] for i, name in enumerate(DIGESTS)}


@dataclass
class Ledger:
    """A whole ledger, whose chain holds as far as `broken` is None."""

    path: Path
    steps: dict[int, Step] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)  # lines of that kind
    broken: str | None = None  # where the chain does not hold, and why
    chain: str = FIRST  # up to the last of `steps`


def read_ledger(path: Path) -> Ledger:
    """Read a ledger and check its chain. UserError where there is none."""
    ledger = Ledger(path)
    start: dict[str, Any] = {}
    before, last = FIRST, 0
    for line in _lines(path):
        match line.get("kind"):
            case "start":
                start = line
            case "records":
                ledger.records.append(line)
            case "step" if ledger.broken is None:
                digests = {name: line.get(name) for name in DIGESTS}
                step = line.get("step")
                if not isinstance(step, int) or not all(map(_is_digest, digests.values())):
                    ledger.broken = f"the line after step {last} is none of a step"
                    continue
                found = {name: str(value) for name, value in digests.items()}
                if step <= last or chained(before, step, found) != line:
                    ledger.broken = (
                        f"the line of step {step} does not follow from those before it: it, one "
                        "before it, or their order was changed"
                    )
                    continue
                before, last = line["chain"], step
                packed = bytes.fromhex("".join(found.values()))
                ledger.steps[step], ledger.chain = Step(step, packed, start), before
    return ledger


def digests_of(path: Path, first: int, last: int) -> dict[int, dict[str, str]]:
    """What the ledger has of steps `first` to `last`, found by bisection; its chain unchecked.

    {} where there is no ledger. A million lines cost some twenty short reads.
    """
    found: dict[int, dict[str, str]] = {}
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return found
    with file:
        low, high = 0, file.seek(0, os.SEEK_END)
        while high - low > _LONGEST:  # the line that is sought begins at `low` or after it
            middle = (low + high) // 2
            there = next(_steps_from(file, middle), None)
            if there is not None and there[0] < first:
                low = middle
            else:
                high = middle
        for step, line in _steps_from(file, low):
            if step > last:
                break
            digests = {name: line.get(name) for name in DIGESTS}
            if step >= first and all(map(_is_digest, digests.values())):
                found[step] = {name: str(value) for name, value in digests.items()}
    return found


def _steps_from(file: BinaryIO, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of steps that begin at `offset` or after it, with their numbers."""
    file.seek(max(0, offset - 1))
    if offset:
        file.readline(_LONGEST)  # the end of a line that began before
    while text := file.readline(_LONGEST):
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.get("kind") == "step" and type(line.get("step")) is int:
            yield line["step"], line


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise UserError(
            f"{path} is not there: the run has not begun yet, keeps no ledger "
            "(log.ledger_every=null), or is of a version that kept none; train it again to have one"
        )
    return iter_jsonl(path)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 16 and not set(value) - set("0123456789abcdef")
