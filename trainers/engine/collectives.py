"""What ranks tell each other. With one process each of these is a copy of its argument."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bigbatch.configs.errors import UserError

T = TypeVar("T")

_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",  # gloo, to a peer that went while it was sent to
    "remote process exited",  # NCCL
)
_REPORTED = "bigbatch/error-reported"  # the store's key for: rank 0 has told of an error
_RANK_0_REPORTS_IN_S = 3


class Collectives:
    """One rank among `world`. Every rank calls a collective in the same step, in one order."""

    rank: int
    world: int
    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_by_name(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over ranks of several tensors, in float64, by one all-reduce.

        In float64, so that sums of float32 values do not depend on the world size.
        """
        vector = torch.cat([part.to(self.device).double().flatten() for part in parts.values()])
        totals = self.sum(vector).split([part.numel() for part in parts.values()])
        return {
            name: total.view(part.shape)
            for (name, part), total in zip(parts.items(), totals, strict=True)
        }

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value (None, a number, text, or lists and dicts of those) on every rank."""
        if self.world > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0, device=self.device)
            value = box[0]
        return value

    def gather_values(self, value: T) -> list[T]:
        """Every rank's value (plain, as for `from_main`) on every rank, in rank order."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def on_main(self, compute: Callable[[], T]) -> T:
        """What `compute` returns on rank 0, on every rank; the others do not call it.

        A UserError or an OSError of rank 0 is raised on all ranks, so that none waits for a
        rank that has ended.
        """
        value: Any = None
        error: UserError | OSError | None = None
        if self.rank == 0:
            try:
                value = compute()
            except (UserError, OSError) as raised:
                error = raised
        failure, value = self.from_main((_described(error), value))
        if error is not None:
            raise error
        if failure is not None:
            kind, arguments = failure
            raise OSError(*arguments) if kind == "OSError" else UserError(*arguments)
        result: T = value
        return result

    def gather_rows(self, rows: Tensor, capacity: int) -> list[np.ndarray] | None:
        """Every rank's rows [n, K] on rank 0, in rank order; None on the other ranks.

        `capacity` is at least the largest n of any rank: collectives need equal shapes.
        """
        if self.world == 1:
            return [rows.cpu().numpy()]
        padded = rows.new_zeros((capacity + 1, *rows.shape[1:]))
        padded[: len(rows)] = rows
        padded[-1] = len(rows)  # the count travels as one more row; exact below 2^24
        parts = [torch.empty_like(padded) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(padded, parts)
        if parts is None:
            return None
        arrays = [part.cpu().numpy() for part in parts]
        return [a[: int(a[-1].flat[0])] for a in arrays]

    def should_report_error(self) -> bool:
        """Whether this rank tells the user of the error that ends it.

        Most errors meet all ranks, and rank 0 tells them; another rank speaks where rank 0
        says nothing within seconds, for then it has met the error alone.
        """
        if self.world == 1:
            return True
        store = dist.distributed_c10d._get_default_store()
        if self.rank == 0:
            store.set(_REPORTED, "")
            return True
        try:
            store.wait([_REPORTED], timedelta(seconds=_RANK_0_REPORTS_IN_S))
        except dist.DistStoreError:  # the wait has timed out
            return True
        except dist.DistError:  # the store went with rank 0, which has spoken
            pass
        return False

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def read_back(parts: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The values of several tensors on the host: one copy, and one wait for the device."""
    vector = torch.cat([part.double().flatten() for part in parts.values()])
    values = iter(vector.tolist())
    return {name: [next(values) for _ in range(part.numel())] for name, part in parts.items()}


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, as gloo and NCCL say it."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER)


def _described(error: UserError | OSError | None) -> tuple[str, tuple[Any, ...]] | None:
    """An error as plain values, which any rank can raise again."""
    if error is None:
        return None
    if isinstance(error, OSError):
        return "OSError", (error.errno, error.strerror, error.filename)
    return "UserError", (str(error),)
