"""How digests travel, and where gradients of two ranks are not compared."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigbatch.configs.load import load_recipe
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
