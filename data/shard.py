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
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import read_jsonl, write_atomically
from bigbatch.data.index import build_index
from bigbatch.data.plan import SPLITS, assign_splits, parse_fractions, plan_shards
from bigbatch.data.sources import Source, open_source
from bigbatch.data.write import Work, write_all

SAMPLES_PER_SHARD = 10_000
_FORMAT = 1  # of what a source becomes; part of the plan, so that a new version starts anew


@dataclass(frozen=True)
class ShardReport:
    """What `shard` wrote. `skipped` lists (key, reason) of images that could not be read."""

    dest: str
    classes: int
    samples: dict[str, int]
    shards: dict[str, int]
    bytes: int
    skipped: list[tuple[str, str]]
    seconds: float


def shard(
    source: str,
    dest: Path,
    *,
    split: str | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    short_side: int | None = None,
    quality: int = 90,
    workers: int = 1,
    progress: bool = True,
) -> ShardReport:
    """Write `source` (a name or path, see sources.open_source) as shards with an index.

    `split` gives the fractions of train, val and test, such as "0.8,0.1,0.1". Images whose
    short side is above `short_side` pixels are reduced to it, JPEGs at `quality` (see
    recode.prepare). Raises UserError for a source that cannot be used, and where `dest`
    exists already. A call that was killed goes on when it is repeated.
    """
    for name, value, low, high in (
        ("samples per shard", samples_per_shard, 1, None),
        ("workers", workers, 1, None),
        ("short side", short_side, 8, None),
        ("quality", quality, 1, 100),
    ):
        if value is not None and (value < low or (high is not None and value > high)):
            rule = f"{low} or more" if high is None else f"from {low} to {high}"
            raise UserError(f"{name} {value} must be {rule}")
    fractions = None if split is None else parse_fractions(split)
    opened = open_source(source)
    return write_shards(
        opened,
        Path(dest),
        splits=assign_splits(opened, fractions),
        samples_per_shard=samples_per_shard,
        short_side=short_side,
        quality=quality,
        workers=workers,
        progress=progress,
    )


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
    partial = dest.with_name(dest.name + ".partial")
    options = [_FORMAT, samples_per_shard, short_side, quality]
    listing = [source.classes, source.keys, source.labels.tolist(), splits.tolist()]
    fingerprint = hashlib.sha256(json.dumps([options, listing]).encode()).hexdigest()
    try:
        with _claim(dest, partial, fingerprint) as done:
            tasks = plan_shards(source, splits, samples_per_shard)
            todo = [[s for s in task if s.name not in done] for task in tasks]
            work = Work(source, str(partial / "data"), short_side, quality)
            with (partial / "journal.jsonl").open("a", encoding="utf-8") as journal:
                for record in write_all(work, [t for t in todo if t], workers, progress):
                    done[record["shard"]] = record
                    journal.write(json.dumps(record) + "\n")
                    journal.flush()
                    os.fsync(journal.fileno())
            records = [done[s.name] for task in tasks for s in task]
            if not dest.exists() or not any(dest.iterdir()):
                _finish(partial / "data", dest, source.classes, records, workers)
            shutil.rmtree(partial)
    except OSError as error:
        raise UserError(
            f"cannot write {dest}: {error}; mend this and repeat the command: it goes on"
        ) from None
    names = [s for s in SPLITS if any(r["shard"].startswith(s) for r in records)]
    return ShardReport(
        dest=str(dest),
        classes=len(source.classes),
        samples={n: sum(r["samples"] for r in records if r["shard"].startswith(n)) for n in names},
        shards={n: sum(r["shard"].startswith(n) for r in records) for n in names},
        bytes=sum(r["bytes"] for r in records),
        skipped=[(key, reason) for r in records for key, reason in r["skipped"]],
        seconds=time.monotonic() - started,
    )


@contextmanager
def _claim(dest: Path, partial: Path, fingerprint: str) -> Iterator[dict[str, dict[str, Any]]]:
    """Make or take over the folder of unfinished work; give the journal's records by shard."""
    plan, data = partial / "plan.json", partial / "data"
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())) and not plan.exists():
        raise UserError(f"{dest} exists already; remove it, or choose another destination")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {dest}; wait for it") from None
        if plan.exists() and json.loads(plan.read_text())["fingerprint"] != fingerprint:
            raise UserError(
                f"{partial} was begun from another source or with other options; repeat those "
                "to go on, or remove it to begin anew"
            )
        if not plan.exists():
            data.mkdir(exist_ok=True)
            write_atomically(plan, json.dumps({"fingerprint": fingerprint}))
        for left_over in data.glob("*/*.tmp-*"):
            left_over.unlink()
        # The last act is the rename of data/ to dest: without data/, all shards are in place.
        place = data if data.exists() else dest
        journal = partial / "journal.jsonl"
        done = {
            r["shard"]: r
            for r in read_jsonl(journal)
            if (place / r["shard"]).is_file() and (place / r["shard"]).stat().st_size == r["bytes"]
        }
        write_atomically(journal, "".join(json.dumps(r) + "\n" for r in done.values()))
        yield done


def _finish(
    data: Path,
    dest: Path,
    classes: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    workers: int,
) -> None:
    """Index each split, write classes.txt, and rename the whole to its final name."""
    skipped = [(key, reason) for r in records for key, reason in r["skipped"]]
    if not any(r["samples"] for r in records):
        raise UserError(f"no image of the source could be read; the first: {': '.join(skipped[0])}")
    for folder in sorted({Path(r["shard"]).parent for r in records}):
        build_index(data / folder, classes=classes, workers=workers)
    write_atomically(data / "classes.txt", "".join(f"{name}\n" for name in classes))
    if skipped:
        write_atomically(data / "skipped.txt", "".join(f"{k}\t{reason}\n" for k, reason in skipped))
    data.rename(dest)
