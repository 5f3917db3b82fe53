"""Writing shards: any source of labelled images -> DEST/SPLIT/000000.tar ... + index.

What is written where is decided before the first byte is read: each sample's split and
place follow from its key alone. So shards can be written in any order, by any number of
processes, and a run that was killed goes on at the first unfinished shard and ends with
the same bytes.

    DEST.partial/  plan.json, journal.jsonl, SPLIT/*.tar    while at work; renamed to DEST
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import read_jsonl, sync, to_json, write_atomically
from bigbatch.configs.json_text import parse_json
from bigbatch.data.index import build_index
from bigbatch.data.tar import BLOCK
from bigbatch.data.writing.assign import (
    SPLITS,
    assign_splits,
    doubts,
    parse_fractions,
    plan_shards,
)
from bigbatch.data.writing.kinds import open_source
from bigbatch.data.writing.recode import prepare
from bigbatch.data.writing.sources import Source, printable
from bigbatch.data.writing.write import Work, texts_of, write_all

SAMPLES_PER_SHARD = 10_000
_FORMAT = 2  # of what a source becomes; part of the plan, so that a new version starts anew


@dataclass(frozen=True)
class ShardReport:
    """What `shard` wrote.

    `skipped` lists (key or file, reason) of what was left out, the same that skipped.txt does;
    `notes` say what else may be wrong, such as a class without a sample.
    """

    dest: str
    classes: int
    samples: dict[str, int]
    shards: dict[str, int]
    bytes: int
    skipped: list[tuple[str, str]]
    notes: list[str]
    seconds: float


def shard(
    source: str,
    dest: Path,
    *,
    split: str | None = None,
    samples_per_shard: int | None = None,
    shard_size: str | None = None,
    short_side: int | None = None,
    quality: int = 90,
    image_column: str | None = None,
    label_column: str | None = None,
    kind: str | None = None,
    target: str | None = None,
    workers: int = 1,
    progress: bool = True,
) -> ShardReport:
    """Write `source` (`digits`, or a path, see open_source) as shards with an index.

    `split` gives the fractions of train, val and test, such as "0.8,0.1,0.1". A shard holds
    `samples_per_shard` samples (default 10,000), or about `shard_size`, such as "256MB".
    Images whose short side is above `short_side` pixels are reduced to it, as JPEG of
    `quality` (see recode.prepare). `image_column` and `label_column` are for Parquet and
    saved datasets, and `label_column` for tars with KEY.json; so is `target`, which names the
    numbers to learn. `kind` says which of several kinds of source in one folder to read. `workers`
    is the number of processes.

    Unreadable images and files that are no images are left out and reported. Raises UserError
    for a source or an option that cannot be used, and where `dest` exists already. A call that
    was killed goes on where it was when it is repeated.
    """
    for name, value, low, high in (
        ("samples per shard", samples_per_shard, 1, 1 << 31),
        ("workers", workers, 1, 1024),
        ("short side", short_side, 8, 1 << 16),
        ("quality", quality, 1, 100),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} {value} must be from {low} to {high:,}")
    if shard_size is not None and samples_per_shard is not None:
        raise UserError("a shard is limited by samples or by size; give one of the two")
    fractions = None if split is None else parse_fractions(split)
    target_bytes = None if shard_size is None else parse_bytes(shard_size)
    dest = Path(dest) if Path(dest).name else Path(dest).resolve()  # "."
    _refuse_to_overwrite(dest)  # before a long listing
    opened = open_source(source, image_column, label_column, workers, kind, target)
    splits = assign_splits(opened, fractions)
    opened.notes.extend(doubts(opened, splits, fractions))
    if target_bytes is not None:
        samples_per_shard = _samples_in(target_bytes, opened, splits, short_side, quality)
    return write_shards(
        opened,
        dest,
        splits=splits,
        samples_per_shard=samples_per_shard or SAMPLES_PER_SHARD,
        short_side=short_side,
        quality=quality,
        workers=workers,
        progress=progress,
    )


def parse_bytes(text: str) -> int:
    """Read "256MB" or "1.5 GB" (decimal units)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)B?\s*", text)
    if match is None:
        raise UserError(f"size {text!r} is not a number and a unit, such as 256MB or 1GB")
    return int(float(match[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[match[2]])


def _samples_in(
    target: int,
    source: Source,
    splits: npt.NDArray[np.str_],
    short_side: int | None,
    quality: int,
) -> int:
    """How many samples make a shard of about `target` bytes, by the first 256 that go into one.

    Not counted while writing, because then a shard could begin only when the one before it
    is done.
    """
    first = plan_shards(source, splits, 256)[0][0]
    sizes = []
    for i in first.items.tolist():
        try:
            data, _ = prepare(source.read(i), short_side, quality)
        except OSError:
            continue
        members = [data, *texts_of(source, i).values()]
        sizes.append(sum(BLOCK + -(-len(member) // BLOCK) * BLOCK for member in members))
    return max(1, round(target * len(sizes) / sum(sizes))) if sizes else SAMPLES_PER_SHARD


def write_shards(
    source: Source,
    dest: Path,
    *,
    splits: npt.NDArray[np.str_],
    samples_per_shard: int = SAMPLES_PER_SHARD,
    short_side: int | None = None,
    quality: int = 90,
    workers: int = 1,
    progress: bool = False,
) -> ShardReport:
    """Write the samples of a source, each into its split, and index them; see `shard`."""
    started = time.monotonic()
    partial = _partial(dest)
    options = [_FORMAT, samples_per_shard, short_side, quality]
    listing = [source.classes, source.keys, source.labels.tolist(), splits.tolist()]
    if source.targets is not None:
        listing.append([numbers.hex() for numbers in source.targets])
    fingerprint = hashlib.sha256(json.dumps([options, listing]).encode()).hexdigest()
    try:
        with _claim(dest, fingerprint) as done:
            tasks = plan_shards(source, splits, samples_per_shard)
            todo = [[s for s in task if s.name not in done] for task in tasks]
            work = Work(source, str(partial / "data"), short_side, quality)
            with (
                (partial / "journal.jsonl").open("a", encoding="utf-8") as journal,
                closing(write_all(work, [t for t in todo if t], workers, progress)) as written,
            ):
                for record in written:
                    done[record["shard"]] = record
                    journal.write(to_json(record) + "\n")
                    journal.flush()
                    os.fsync(journal.fileno())
            records = [done[s.name] for task in tasks for s in task]
            if (partial / "data").exists():
                _finish(partial / "data", dest, source, records, workers)
            shutil.rmtree(partial)
    except OSError as error:
        raise UserError(
            f"cannot write {dest}: {error}; mend this and repeat the command: it goes on"
        ) from None
    names = [s for s in SPLITS if any(r["shard"].startswith(s) and r["samples"] for r in records)]
    return ShardReport(
        dest=str(dest),
        classes=len(source.classes),
        samples={n: sum(r["samples"] for r in records if r["shard"].startswith(n)) for n in names},
        shards={n: sum(r["shard"].startswith(n) for r in records) for n in names},
        bytes=sum(r["bytes"] for r in records),
        skipped=_skipped(source, records),
        notes=source.notes + _emptied(source, splits, records),
        seconds=time.monotonic() - started,
    )


def _emptied(
    source: Source, splits: npt.NDArray[np.str_], records: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Notes on the splits and classes of which no image could be read."""
    notes = []
    for split in SPLITS:
        counts = [r["samples"] for r in records if r["shard"].startswith(split)]
        if counts and not any(counts):
            notes.append(f"no image of the {split} split could be read; it is left out")
    lost = {(r["shard"].partition("/")[0], key) for r in records for key, _ in r["skipped"]}
    places = enumerate(zip(splits.tolist(), source.keys, strict=True))
    kept = [i for i, place in places if place not in lost] if lost else slice(None)
    had, left = (
        np.bincount(labels, minlength=len(source.classes))
        for labels in (source.labels, source.labels[kept])
    )
    emptied = [source.classes[c] for c in np.flatnonzero((had > 0) & (left == 0))]
    shown = ", ".join(emptied[:5]) + (", ..." if len(emptied) > 5 else "")
    return notes + ([f"classes of which no image could be read: {shown}"] if emptied else [])


def _partial(dest: Path) -> Path:
    return dest.parent / f"{dest.name}.partial"


def _refuse_to_overwrite(dest: Path) -> bool:
    """UserError where `dest` is in use; True where it is what a killed run had just finished."""
    # The last act is the rename of data/ to dest, and then only DEST.partial is to be removed.
    partial = _partial(dest)
    finished = (
        dest.is_dir() and (partial / "plan.json").exists() and not (partial / "data").exists()
    )
    if dest.exists() and not finished and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{dest} exists already; remove it, or choose another destination")
    return finished


@contextmanager
def _claim(dest: Path, fingerprint: str) -> Iterator[dict[str, dict[str, Any]]]:
    """Make or take over the folder of unfinished work; give the journal's records by shard."""
    finished = _refuse_to_overwrite(dest)
    partial = _partial(dest)
    plan, data = partial / "plan.json", partial / "data"
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {dest}; wait for it") from None
        if plan.exists() and _fingerprint(plan) != fingerprint:
            raise UserError(
                f"{partial} was begun from another source or with other options; repeat those "
                "to go on, or remove it to begin anew"
            )
        if not finished:
            data.mkdir(exist_ok=True)
        if not plan.exists():
            write_atomically(plan, to_json({"fingerprint": fingerprint}))
        for left_over in (*data.glob("*/*.tar.tmp-*"), *data.glob(".*.tmp-*")):
            left_over.unlink()
        place = dest if finished else data
        journal = partial / "journal.jsonl"
        done = {
            r["shard"]: r
            for r in read_jsonl(journal)
            if (place / r["shard"]).is_file() and (place / r["shard"]).stat().st_size == r["bytes"]
        }
        write_atomically(journal, "".join(to_json(r) + "\n" for r in done.values()))
        yield done


def _fingerprint(plan: Path) -> object:
    """What a plan.json says; None for a damaged one, which is then of another source."""
    try:
        content = parse_json(plan.read_bytes())
    except ValueError:
        return None
    return content.get("fingerprint") if isinstance(content, dict) else None


def _finish(
    data: Path,
    dest: Path,
    source: Source,
    records: Sequence[Mapping[str, Any]],
    workers: int,
) -> None:
    """Index each split, write classes.txt, and rename the whole to its final name."""
    if not any(r["samples"] for r in records):
        key, why = next(skipped for r in records for skipped in r["skipped"])
        raise UserError(f"no image of the source could be read; the first: {key}: {why}")
    read = sorted({Path(r["shard"]).parent for r in records if r["samples"]})
    for folder in sorted({Path(r["shard"]).parent for r in records} - set(read)):
        shutil.rmtree(data / folder, ignore_errors=True)  # nothing in it could be read
    for folder in read:
        made = build_index(data / folder, classes=source.classes, workers=workers)
        wrote = sum(r["samples"] for r in records if Path(r["shard"]).parent == folder)
        assert len(made) == wrote, f"{folder}: wrote {wrote:,} samples, {len(made):,} are found"
    write_atomically(data / "classes.txt", "".join(f"{name}\n" for name in source.classes))
    if skipped := _skipped(source, records):
        write_atomically(data / "skipped.txt", "".join(f"{k}\t{why}\n" for k, why in skipped))
    # Records of the journal are checked by size alone: a power cut may leave the rest to chance.
    for r in records:
        if Path(r["shard"]).parent in read:
            sync(data / r["shard"])
    for folder in (*data.iterdir(), data):
        sync(folder)
    data.rename(dest)
    sync(dest.parent)


def _skipped(source: Source, records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """All that was left out, and why: printable, whatever bytes names and errors hold."""
    found = [*source.skipped, *(skipped for r in records for skipped in r["skipped"])]
    return [(printable(what), printable(why)) for what, why in found]
