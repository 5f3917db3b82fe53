"""The chain of a ledger: what was changed, taken out or put elsewhere breaks it there."""

import json
import math
from pathlib import Path

import pytest

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import to_json
from bigbatch.trainers.ledger.lines import (
    DIGESTS,
    FIRST,
    chained,
    digests_of,
    last_chain,
    loss_bits,
    loss_of,
    read_ledger,
)


def lines_of(steps: int, world: int = 1) -> list[str]:
    lines, chain = [to_json({"kind": "start", "step": 0, "world": world})], FIRST
    for step in range(1, steps + 1):
        line = chained(chain, step, dict.fromkeys(DIGESTS, f"{step:016x}"))
        lines.append(to_json(line))
        chain = line["chain"]
    return lines


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_whole_ledger_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", lines_of(5))
    ledger = read_ledger(path)
    assert ledger.broken is None
    assert list(ledger.steps) == [1, 2, 3, 4, 5]
    assert ledger.steps[3].start["world"] == 1
    assert last_chain(path) == json.loads(lines_of(5)[-1])["chain"]
    assert last_chain(tmp_path / "none.jsonl") == FIRST
    with pytest.raises(UserError, match="keeps no ledger"):
        read_ledger(tmp_path / "none.jsonl")


def changed(lines: list[str], how: str) -> list[str]:
    match how:
        case "digest":
            record = json.loads(lines[3])
            record["weights"] = record["weights"][:-1] + "f"
            return [*lines[:3], to_json(record), *lines[4:]]
        case "taken out":
            return [*lines[:3], *lines[4:]]
        case "swapped":
            return [*lines[:3], lines[4], lines[3], *lines[5:]]
        case "torn":
            return [*lines[:3], lines[3][:50], *lines[4:]]
        case "no digest":
            return [*lines[:3], to_json(json.loads(lines[3]) | {"loss": 2.5}), *lines[4:]]
    raise AssertionError


@pytest.mark.parametrize("how", ["digest", "taken out", "swapped", "torn", "no digest"])
def test_a_change_breaks_the_chain_where_it_is(tmp_path: Path, how: str) -> None:
    ledger = read_ledger(write(tmp_path / "ledger.jsonl", changed(lines_of(6), how)))
    assert ledger.broken is not None
    assert list(ledger.steps) == [1, 2]


def test_some_steps_are_found_by_bisection(tmp_path: Path) -> None:
    """In a file of many blocks, at every tenth step, among lines that are none of a step."""
    lines, chain = [to_json({"kind": "start", "step": 0})], FIRST
    for step in range(10, 30_010, 10):
        line = chained(chain, step, dict.fromkeys(DIGESTS, f"{step:016x}"))
        lines.append(to_json(line))
        chain = line["chain"]
        if step % 500 == 0:
            lines += [to_json({"kind": "records", "step": step, "bytes": 1}), "", "torn {"]
    path = write(tmp_path / "ledger.jsonl", lines)
    for first, last in (
        (1, 30),
        (10, 10),
        (14_995, 15_025),
        (29_990, 40_000),
        (11, 19),
        (1, 10**9),
    ):
        found = digests_of(path, first, last)
        assert list(found) == [s for s in range(10, 30_010, 10) if first <= s <= last]
        assert all(set(d.values()) == {f"{step:016x}"} for step, d in found.items())
    assert digests_of(tmp_path / "none.jsonl", 1, 9) == {}
    path.write_bytes(bytes(range(256)) * 2000)
    assert digests_of(path, 1, 9) == {}


def test_few_lines_are_read_for_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "ledger.jsonl", lines_of(4000))
    parsed: list[bytes] = []
    monkeypatch.setattr(
        "bigbatch.trainers.ledger.lines.parse_json",
        lambda text: parsed.append(text) or json.loads(text),
    )
    assert list(digests_of(path, 3000, 3002)) == [3000, 3001, 3002]
    assert len(parsed) < 400


def test_who_computed_a_line_is_no_part_of_the_chain(tmp_path: Path) -> None:
    one, two = lines_of(3), lines_of(3, world=2)
    assert one[1:] == two[1:]
    again = to_json({"kind": "start", "step": 2, "world": 4})
    ledger = read_ledger(write(tmp_path / "ledger.jsonl", [*one[:3], again, one[3]]))
    assert ledger.broken is None
    assert [ledger.steps[s].start["world"] for s in (1, 2, 3)] == [1, 1, 4]


@pytest.mark.parametrize("loss", [0.1 + 0.2, -0.0, math.inf, math.nan, 5e-324])
def test_a_loss_is_kept_bit_for_bit(loss: float) -> None:
    assert loss_bits(loss_of(loss_bits(loss))) == loss_bits(loss)
    assert len(loss_bits(loss)) == 16
