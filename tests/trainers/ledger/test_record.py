"""Which steps get a line: what no interruption changes."""

from types import SimpleNamespace
from typing import Any

import pytest

from bigbatch.configs.load import load_recipe
from bigbatch.trainers.ledger.record import LedgerWriter
from bigbatch.trainers.planning.plan import make_plan

KEEPING = "checkpoint={every: 7 steps, keep_every: 9 steps}"


def due(*overrides: str, stop: int | None = None) -> list[int]:
    recipe = load_recipe("digits", ["duration=25 steps", "evaluate.every=4 steps", *overrides])
    plan: Any = make_plan(recipe, 1000, stop)
    job: Any = SimpleNamespace(recipe=recipe, inputs=SimpleNamespace(plan=plan))
    writer = LedgerWriter.__new__(LedgerWriter)
    writer._job, writer._every = job, recipe.log.ledger_every
    return [step for step in range(1, 26) if writer.due(step)]


@pytest.mark.parametrize("stop", [None, 12])
def test_every_tenth_every_planned_checkpoint_and_the_last(stop: int | None) -> None:
    assert due(KEEPING, stop=stop) == [7, 9, 10, 14, 18, 20, 21, 25]
    assert due(KEEPING, "log.ledger_every=12", stop=stop) == [7, 9, 12, 14, 18, 21, 24, 25]
    assert due(KEEPING, "log.ledger_every=null", stop=stop) == []


def test_each_evaluation_is_saved_where_the_best_is_gone_back_to() -> None:
    early = "schedule={name: cosine}", "regularise={early_stop: {patience: 2}}"
    found = due("checkpoint={every: 100 steps, keep_best: 1}", *early)
    assert found == [4, 8, 10, 12, 16, 20, 24, 25]
