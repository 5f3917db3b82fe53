"""What could not be read in a run: RUN/bad-samples-RANK.jsonl, one entry for each bad sample.

An entry of an indexed sample: step, position, sample (its number in the index), shard, offset
(of its bytes in the shard), reason, substitute (the sample that took its place). Of a stream:
step, key, shard (a URL, where known) and reason; nothing takes its place. Free of torch.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bigbatch.configs.files import append_whole, read_jsonl, to_json
from bigbatch.configs.notices import notice

Entry = dict[str, Any]
_held_back: dict[Path, list[Entry]] = {}  # by journal; at most data.bad_samples of them


def journal_file(run: Path, rank: int) -> Path:
    """Where a rank notes what it cannot read."""
    return run / f"bad-samples-{rank:05d}.jsonl"


def append(journal: Path | None, entries: Iterable[Entry]) -> None:
    """Add entries in one write, so that a kill leaves whole lines.

    A disk that takes none ends no training: that is said, and they wait for the next entries.
    """
    if journal is None or not (waiting := _held_back.pop(journal, []) + list(entries)):
        return
    try:
        handle = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            append_whole(handle, "".join(to_json(entry) + "\n" for entry in waiting).encode())
        finally:
            os.close(handle)
    except OSError as error:
        _held_back[journal] = waiting
        notice(f"what could not be read waits for room in {journal}: {error.strerror or error}")


def read_journal(run: Path) -> list[Entry]:
    """The entries of all ranks by step and position, each once.

    A resumed run reads the steps after its checkpoint again, at another world size on other
    ranks, and so notes the same things a second time.
    """
    found: dict[str, Entry] = {}
    for path in sorted(run.glob("bad-samples-*.jsonl")):
        for entry in read_jsonl(path):
            found.setdefault(json.dumps(entry, sort_keys=True), entry)
    return sorted(found.values(), key=lambda e: (e["step"], e.get("position", 0)))


def count(entries: Sequence[Entry]) -> dict[str, Any]:
    """How much was bad: entries, different samples, and samples of each shard and reason."""
    different = {_identity(entry): entry for entry in entries}.values()
    shards = Counter(str(e["shard"]) for e in different)
    reasons = Counter(kind(e["reason"]) for e in different)
    return {
        "entries": len(entries),
        "samples": len(different),
        "shards": dict(shards.most_common()),
        "reasons": dict(reasons.most_common()),
    }


def kind(reason: str) -> str:
    """A reason without what differs between samples: "0 bytes" and "7 bytes" are one kind."""
    return re.sub(r"'[^']*'", "...", re.sub(r"\d[\d,]*", "N", reason.partition(" (")[0]))


def by_sample(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """A row for each bad sample: where it lies, why it is bad, its steps and substitutes."""
    rows: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        names = ("sample", "key", "shard", "offset", "reason")
        row = {name: entry.get(name) for name in names} | {"steps": [], "substitutes": []}
        row = rows.setdefault(_identity(entry), row)
        row["steps"].append(entry["step"])
        if entry.get("substitute") is not None:
            row["substitutes"].append(entry["substitute"])
    return list(rows.values())


def _identity(entry: Entry) -> tuple[Any, ...]:
    if entry.get("sample") is not None:
        return (entry["sample"],)
    return entry.get("key"), entry["shard"], entry["reason"]
