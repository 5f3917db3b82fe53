"""The journal of bad samples as a user wants it: with keys, and counted."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from bigbatch.configs.errors import UserError
from bigbatch.configs.rundir import RunDir
from bigbatch.data.journal import by_sample, count, read_journal
from bigbatch.trainers.planning.inputs import open_split


def describe(run: RunDir) -> dict[str, Any]:
    """What a run could not read, in plain values: counts, and each bad sample with its key.

    Keys are null where the run's shards cannot be opened here.
    """
    data = run.recipe().data
    entries = read_journal(run.path)
    rows = by_sample(entries)
    if any(row["sample"] is not None for row in rows):
        keys: Sequence[str] = ()
        with suppress(UserError):  # the journal says enough without them
            keys = open_split(data, data.train).keys()

        def name(sample: int) -> str | None:
            return keys[sample] if sample < len(keys) else None

        for row in rows:
            row["key"] = name(row["sample"])
            row["substitutes"] = [{"sample": i, "key": name(i)} for i in row["substitutes"]]
    return {"run": str(run.path), **count(entries), "bad": rows}
