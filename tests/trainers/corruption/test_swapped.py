"""How digests travel, and where gradients of two ranks are not compared."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigbatch.configs.load import load_recipe
from bigbatch.trainers.corruption.check import CorruptionCheck
from bigbatch.trainers.corruption.swapped import from_rows, in_row, why_not


def test_digests_of_all_ranks_come_out_of_one_sum() -> None:
    found = [[-1, 2**63 - 1], [-(2**63), 0], [1 << 32, (1 << 32) - 1], [0x123456789ABCDEF, -7]]
    rows = [in_row(torch.tensor(digests), rank, 4) for rank, digests in enumerate(found)]
    sums = torch.stack(rows).sum(0).tolist()
    mask = (1 << 64) - 1
    assert from_rows(sums, 2) == [tuple(d & mask for d in digests) for digests in found]


def a_job(*overrides: str, device: str = "cpu", world: int = 2, **more: Any) -> Any:
    recipe = load_recipe("digits", overrides)
    engine = SimpleNamespace(
        device=torch.device(device),
        world=world,
        sees_each=recipe.reduction == "exact" or world == 1,
        pieces=None if recipe.backend == "ddp" else (),
    )
    return SimpleNamespace(recipe=recipe, engine=engine, inputs=SimpleNamespace(order=1), **more)


@pytest.mark.parametrize(
    ("job", "alike", "reason"),
    [
        (a_job(), True, None),
        (a_job("reduction=overlapped"), True, None),
        (a_job("backend=zero2", "reduction=overlapped"), True, None),
        (a_job(), False, "unlike processors"),
        (a_job(device="cuda"), True, "a GPU's kernels"),
        (a_job("backend=fsdp2", "reduction=overlapped"), True, "on backend fsdp2 no rank"),
        (a_job("model.compile=true"), True, None),
        (a_job("model.compile=true", "reduction=overlapped"), True, "inside DDP torch.compile"),
        (a_job("model.compile=true", "reduction=overlapped", world=1), True, None),
    ],
)
def test_gradients_are_compared_where_bits_come_again(
    job: Any, alike: bool, reason: str | None
) -> None:
    found = why_not(job, alike=alike)
    assert found is None if reason is None else reason in (found or "")


def test_ranks_of_unlike_environments_compare_nothing_and_rank_0_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = a_job("recovery.corruption.recompute_every=5")
    job.engine.rank = 0
    job.engine.gather_values = lambda value: [value, "of another processor"]
    ledger: Any = SimpleNamespace(due=lambda step: True)  # nobody asks it for digests
    check = CorruptionCheck(job, None, ledger)  # type: ignore[arg-type]
    check.begin(4, 4)
    assert check.copies() is None
    assert check.compare(4) is None
    assert check.share_gradients().numel() == 0
    said = capsys.readouterr().err
    assert "digests of ranks are not compared (recovery.corruption): ranks have unlike" in said
    assert "gradients of two ranks are not compared (recovery.corruption): ranks have" in said
