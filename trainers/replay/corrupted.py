"""Which rank was right, where ranks held different states after a step: a replay says it."""

from collections.abc import Mapping
from typing import Any

from bigbatch.configs.files import iter_jsonl
from bigbatch.configs.rundir import RunDir
from bigbatch.trainers.ledger.lines import DIGESTS
from bigbatch.trainers.ledger.multipliers import MASK

Record = dict[str, Any]


def compare_ranks(run: RunDir, step: int, line: Mapping[str, Any]) -> list[Record]:
    """Each rank of the last event of kind corruption about the state after `step` finished steps.

    `line` is that of the ledger, as the step came out now. A record has `rank` and `right`: whether
    the rank held that state. [] without such an event.
    """
    found: list[Record] = []
    for event in iter_jsonl(run.events, b'"corruption"'):
        if event.get("kind") != "corruption" or event.get("step") != step:
            continue
        copied, held = event.get("copied"), event.get("digests")
        if not isinstance(copied, list) or not isinstance(held, list) or not copied:
            continue
        if all(name in DIGESTS and name in line for name in copied):
            here = f"{sum(int(line[name], 16) for name in copied) & MASK:016x}"
            found = [{"rank": i, "right": value == here} for i, value in enumerate(held)]
    return found


def words(ranks: list[Record]) -> list[str]:
    """The same in a line; none where ranks did not differ."""
    if not ranks:
        return []
    right, wrong = (
        [str(r["rank"]) for r in ranks if r["right"] is is_so] for is_so in (True, False)
    )
    if not right:
        return [
            "corruption: no rank held this state after the step: they differ since an earlier one, "
            "or sums round otherwise here"
        ]
    return [
        f"corruption: after this step rank{'s' * (len(right) > 1)} {', '.join(right)} held this "
        f"state, bit for bit, and rank{'s' * (len(wrong) > 1)} {', '.join(wrong)} did not"
    ]
