"""Costs of answers that follow what validation confuses."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bigbatch.configs.errors import UserError
from bigbatch.configs.files import iter_jsonl

Counts = Sequence[Sequence[int]]  # [C][C]: row = true class, column = answer
_MOST = 1000  # classes: a record of an evaluation holds their square


class ConfusionCosts:
    """What the answer k costs for the label y: (1 - share) + share r_yk / mean r, and 0 for y = k.

    r_yk is the share of validation samples of class y that the last evaluation answered by k, and
    the mean is over all pairs of different classes: so that costs have a mean of 1 whatever is
    confused. Before the first evaluation, and where nothing is confused, each is 1.
    """

    def __init__(self, classes: int, share: float) -> None:
        if classes > _MOST:
            raise UserError(
                f"loss confusion_cost records pairs of classes, and {classes:,} have too many; "
                f"take another loss, or at most {_MOST:,} classes"
            )
        self._even = 1 - torch.eye(classes, dtype=torch.float64)
        self._share = share
        self._known: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.update(None)

    def update(self, counts: Counts | None) -> None:
        """Take the confusion of an evaluation, the same on every rank; None: there was none yet."""
        self.costs = self._even
        self._known.clear()
        if counts is None:
            return
        table = torch.tensor(counts, dtype=torch.float64)
        rates = self._even * table / table.sum(1, keepdim=True).clamp(min=1)
        if (total := rates.sum()) > 0:
            mean = total / self._even.sum()
            self.costs = (1 - self._share) * self._even + self._share * rates / mean

    def like(self, tensor: Tensor) -> Tensor:
        """The costs on the device and of the type of `tensor`; copied once for each."""
        key = tensor.device, tensor.dtype
        if key not in self._known:
            self._known[key] = self.costs.to(*key)
        return self._known[key]


def read_confusion(metrics: Path, step: int) -> Counts | None:
    """What the last evaluation up to `step` confused, from metrics.jsonl; None without one."""
    newest = iter_jsonl(metrics, b'"confusion"', newest_first=True)
    found = (r for r in newest if r.get("kind") == "confusion" and r["step"] <= step)
    return next((record["matrix"] for record in found), None)
